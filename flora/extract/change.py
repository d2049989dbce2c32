"""One pair of tensors, from the files to certified factors: the part of the work that runs on many pairs at once."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from threading import local

import torch
from torch import Tensor

from flora.checkpoint import Checkpoint, TensorInfo
from flora.errors import CheckpointError, NotFinite
from flora.extract.config import ExtractConfig
from flora.extract.delta import (
    Delta,
    compute_delta,
    count_differing,
    is_finite,
    same_bits,
    squared_norm,
    storage_noise,
)
from flora.extract.dequantize import FP8
from flora.extract.factorize import Basis, factorize, wide
from flora.extract.fit import Fit, fit
from flora.extract.pair import TensorPair
from flora.extract.rank import smallest_rank, terms_to_fit
from flora.extract.regroup import readable_pair, ulps_of_pair
from flora.extract.station import Station
from flora.extract.stopwatch import Stopwatch
from flora.forms import as_matrix
from flora.rank import rank_for_energy, signal_rank


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What one pair turned out to be."""

    pair: TensorPair
    norm_squared: float = 0.0  # of the float32 delta
    noise: float = 0.0
    fit: Fit | None = None  # of an extractable pair that changed
    energies: Tensor | None = None  # squared singular values of the fitted terms, float64 [rank]
    whole: Tensor | None = None  # the tuned tensor, of an exact pair that changed; in float32 where it is float64
    lost: float = 0.0  # squared norm of what that rounding takes from it
    num_changed: int = 0  # elements that differ
    signal_rank: int | None = None  # of an extractable pair that changed: `flora.rank.signal_rank`
    signal_energy: float = 0.0
    tied: bool = False  # an output head that is its token embedding again on both sides
    seconds: Mapping[str, float] = field(default_factory=dict)  # by `stopwatch.STAGES`


class PairWorker:
    """Works on pairs of one base and one tuned checkpoint; each thread that calls it has a station of its own."""

    def __init__(
        self,
        base: Checkpoint,
        tuned: Checkpoint,
        ranks: Mapping[str, int],
        config: ExtractConfig,
        threads: local | None = None,
    ) -> None:
        """`threads`, their stations, may be shared by the workers of several tuned checkpoints, which take turns."""
        self._base, self._tuned = readable_pair(base, tuned)
        self._ulps = ulps_of_pair(base, tuned)
        self._ranks = ranks
        self._config = config
        self._threads = threads or local()
        # torch loads a GPU's linear algebra on first use, and fails if two threads do so at once
        torch.linalg.cholesky(torch.ones(1, 1, device=config.device))

    def __call__(self, pair: TensorPair) -> Change:
        """The change of `pair`. Raises NotFinite, CheckpointError."""
        if pair.tuned is None or self._is_tied(pair):
            return Change(pair, tied=pair.tuned is not None)
        station = self._station()
        with station.at_work():
            change = self._work(pair, station)
        return replace(change, seconds=station.stopwatch.take())

    def _work(self, pair: TensorPair, station: Station) -> Change:
        if pair.buffer_reason is not None:
            return Change(pair, num_changed=self._count_differing(pair))
        delta = self._delta(pair, station)
        if pair.status == "exact" and (delta.norm_squared > 0 or pair.num_new_rows):
            return self._keep_whole(pair, delta)
        if delta.values is None:
            return Change(pair, delta.norm_squared, delta.noise, num_changed=delta.num_changed)
        return self._factorize(pair, delta, as_matrix(pair.kind, delta.values), station.stopwatch)

    def _count_differing(self, pair: TensorPair) -> int:
        """Elements of a buffer that differ; none where one side alone stores it."""
        if pair.base is None or pair.tuned is None:
            return 0
        return count_differing(self._base.load(pair.base.name), self._tuned.load(pair.tuned.name))

    def _keep_whole(self, pair: TensorPair, delta: Delta) -> Change:
        """A vector as the tuned checkpoint has it; of a grown table, its new rows. Adapters hold no float64."""
        assert pair.tuned is not None
        old_rows = pair.shape[0] if pair.num_new_rows else 0
        tuned = self._tuned.load(pair.tuned.name)[old_rows:]
        whole = tuned.float() if tuned.dtype == torch.float64 else tuned.clone()
        if not is_finite(whole):
            raise _not_finite(pair.tuned)
        norm = delta.norm_squared + (squared_norm(tuned) if pair.num_new_rows else 0.0)
        lost = squared_norm(tuned - whole) if whole.dtype != tuned.dtype else 0.0
        return Change(pair, norm, delta.noise, whole=whole, lost=lost, num_changed=delta.num_changed)

    def _is_tied(self, pair: TensorPair) -> bool:
        """Whether an output head is the token embedding on both sides, stored twice or left out."""
        if pair.twin is None or pair.base is None or pair.tuned is None:
            return False
        sides = ((self._base, pair.base, pair.twin[0]), (self._tuned, pair.tuned, pair.twin[1]))
        return all(same_bits(side.load(head.name), side.load(table.name)) for side, head, table in sides)

    def _delta(self, pair: TensorPair, station: Station) -> Delta:
        assert pair.tuned is not None
        tuned = station.bring(self._tuned, pair.tuned.name)
        base = station.bring(self._base, pair.base.name) if pair.base else tuned.new_zeros(()).expand(tuned.shape)
        if pair.num_new_rows:
            tuned = tuned[: pair.shape[0]]
        with station.stopwatch.on_device("delta"):
            delta = compute_delta(base, tuned, station.workspace if pair.status == "extractable" else None)
        if not math.isfinite(delta.norm_squared):
            if pair.status not in ("extractable", "exact") and count_differing(base, tuned) == 0:
                return Delta(None, 0.0, 0.0)  # a mask, perhaps: what no adapter carries may be infinite on both sides
            raise _not_finite(pair.tuned if is_finite(base) or pair.base is None else pair.base)
        info = self._ulps.tensors.get(pair.tuned.name) if self._ulps and delta.norm_squared else None
        if self._ulps is None or info is None or info.dtype != FP8:
            return delta
        ulps = self._ulps.load(info.name)[: len(tuned)]  # of which a sample goes to the device
        return replace(delta, noise=storage_noise(base, tuned, delta.norm_squared, ulps))

    def _factorize(self, pair: TensorPair, delta: Delta, values: Tensor, stopwatch: Stopwatch) -> Change:
        with stopwatch.on_device("factorize"):
            basis = factorize(
                wide(values),
                delta.norm_squared,
                max_rank=self._ranks[pair.name],
                energy=self._config.rule.energy,
                exact=self._config.exact,
                seed=f"{self._config.seed}:{pair.name}",  # so the order of the work does not matter
            )
        with stopwatch.on_device("fit"):
            fitted = self._fit_rank(pair, delta.norm_squared, values, basis)
        squares = basis.values.square().cpu()
        signal = signal_rank(basis.values.cpu(), delta.norm_squared, tuple(values.shape))
        return Change(
            pair,
            delta.norm_squared,
            delta.noise,
            fitted,
            energies=squares[: fitted.factors.rank],
            num_changed=delta.num_changed,
            signal_rank=signal,
            signal_energy=float(squares[:signal].sum()),
        )

    def _fit_rank(self, pair: TensorPair, norm_squared: float, values: Tensor, basis: Basis) -> Fit:
        """The smallest rank whose stored factors keep the asked energy, fitting no more terms than that takes."""
        energy, available = self._config.rule.energy, len(basis.values)
        rank = available
        if energy is not None:
            rank = terms_to_fit(rank_for_energy(basis.values, norm_squared, energy), available)
        fitted = self._fit(pair, values, basis, rank)
        if energy is not None and rank < available and fitted.kept[-1] < energy * norm_squared:
            fitted = self._fit(pair, values, basis, available)
        return fitted.trim(smallest_rank(fitted.kept, norm_squared, energy))

    def _fit(self, pair: TensorPair, values: Tensor, basis: Basis, rank: int) -> Fit:
        dtype = self._config.factor_dtype
        fitted = fit(values, basis, rank, getattr(torch, dtype))
        if fitted.factors.rank == 0 or not bool(torch.isfinite(fitted.kept).all()):
            raise CheckpointError(
                f"the factors of {pair.module} do not fit into {dtype}",
                cause="its change is too large or too small for that number format",
                fix="store them with --dtype bfloat16 or float32",
                tensor=pair.name,
            )
        return fitted

    def _station(self) -> Station:
        if not hasattr(self._threads, "station"):
            self._threads.station = Station(self._config.device)
        return self._threads.station


def _not_finite(info: TensorInfo) -> NotFinite:
    return NotFinite(
        f"{info.name} of {info.file} holds NaN or infinite values",
        cause="the training diverged, or the file was damaged when it was written",
        fix="take an earlier checkpoint of that run",
        tensor=info.name,
        file=info.file,
    )
