"""What became of every tensor of the pair, in numbers and in words; and whether that is an adapter at all."""

import math
from collections.abc import Mapping, Sequence, Set
from typing import Literal

import msgspec
import torch

from flora.adapter import ChangeReport, TensorChange
from flora.checkpoint import Checkpoint
from flora.diagnosis import WRONG_TOOL, diagnose_report, kinds
from flora.errors import CheckFailed, CheckpointError, NothingChanged, UsageError
from flora.extract.change import Change
from flora.extract.config import ExtractConfig
from flora.extract.delta import squared_norm
from flora.extract.rank import shortfall

_WORTH_SAYING = 0.005  # share of a change that is storage noise


def make_report(
    changes: Sequence[Change], cut: Set[str], caps: Mapping[str, int], config: ExtractConfig
) -> ChangeReport:
    """One line for each change, in their order.

    cut  modules that the budget took terms from;  caps  the most terms that each could get, by its tensor's name
    """
    return ChangeReport(tensors=tuple(_describe(change, cut, caps, config) for change in changes))


def _describe(change: Change, cut: Set[str], caps: Mapping[str, int], config: ExtractConfig) -> TensorChange:
    pair = change.pair
    if change.fit is not None:
        rank = change.fit.factors.rank
        kept = float(change.fit.kept[-1]) if rank else 0.0
        missed = shortfall(
            kept / change.norm_squared,
            config.rule,
            rank=rank,
            cap=caps[pair.name],
            side=min(pair.matrix_shape),
            cut=pair.module in cut,
            dtype=config.factor_dtype,
        )
        if missed and change.noise > max(1 - (config.rule.energy or 1.0), _WORTH_SAYING) * change.norm_squared:
            missed += f"; storage noise alone is {change.noise / change.norm_squared:.1%} of its change"
        nothing = "the budget leaves it no terms" if rank == 0 else None
        told = _tensor_change(change, "extracted", kept=kept, rank=rank, reason=nothing or missed)
        if change.fit.factors.A.dtype != torch.float8_e4m3fn or not rank:
            return told
        return msgspec.structs.replace(told, kept_by_rank=tuple(change.fit.kept.tolist()))
    if change.tied:
        assert pair.twin is not None
        return _tensor_change(change, "unchanged", reason=f"tied: it is {pair.twin[0].name}, where its change counts")
    if change.whole is not None:
        carried = squared_norm(change.whole) if pair.num_new_rows else change.norm_squared - change.lost
        return _tensor_change(change, "exact", kept=carried, reason=pair.reason if pair.num_new_rows else None)
    if pair.buffer_reason is not None and change.num_changed:
        return _tensor_change(change, "not_extractable", reason=f"{pair.reason}: it differs, and counts for nothing")
    if pair.status == "extractable" or (change.norm_squared == 0 and len(pair.sides) == 2):
        return _tensor_change(change, "unchanged")
    return _tensor_change(change, pair.status, reason=pair.reason)


def _tensor_change(
    change: Change,
    status: Literal["extracted", "exact", "unchanged", "not_extractable", "excluded"],
    *,
    kept: float = 0.0,
    rank: int | None = None,
    reason: str | None = None,
) -> TensorChange:
    changed_share = change.num_changed / max(1, math.prod(change.pair.shape))  # a tensor may have no elements
    return TensorChange(
        name=change.pair.name,
        shape=change.pair.shape,
        status=status,
        norm_squared=change.norm_squared,
        kept=kept,
        rank=rank,
        noise=change.noise,
        reason=reason,
        changed_share=changed_share if change.pair.tuned is not None else None,
        signal_rank=change.signal_rank,
        signal_energy=change.signal_energy,
    )


def check_report(report: ChangeReport, base: Checkpoint, tuned: Checkpoint, config: ExtractConfig) -> None:
    """Raises CheckpointError if there is nothing to make an adapter of, CheckFailed if `strict` does not hold."""
    extracted = [tensor for tensor in report.tensors if tensor.status == "extracted"]
    if report.norm_squared == 0:
        raise NothingChanged(
            f"{tuned.path} holds the same weights as {base.path}",
            cause="nothing was tuned, or one of the two is a copy of the other",
            fix="give the checkpoint that the tuning wrote",
        )
    if not extracted:
        changed = max(report.tensors, key=lambda tensor: tensor.norm_squared)
        raise CheckpointError(
            f"nothing that can be extracted differs between {base.path} and {tuned.path}",
            cause=f"the change lies in other tensors; {changed.name} holds {report.share(changed):.0%} of it "
            f"({changed.reason})",
            fix="take it too with --embeddings and --vectors, or widen --include and --exclude, if you gave them",
        )
    if not any(tensor.rank for tensor in extracted):
        raise UsageError(
            f"a budget of {config.rule.budget_bytes} bytes is less than the smallest module takes at rank 1",
            fix="give a larger --budget",
        )
    kind = diagnose_report(report)
    if config.strict and kind in WRONG_TOOL:
        raise CheckFailed(
            f"the change from {base.path} to {tuned.path} is {kind.replace('_', ' ')}",
            cause=f"{kinds(report)[kind]:.0%} of what changed in the modules is so: low rank is the wrong tool for it",
            fix="serve the checkpoint itself; or leave out --strict, and measure your task with the adapter",
            kind=kind,
        )
    missed = [tensor for tensor in extracted if tensor.kept < (config.rule.energy or 0.0) * tensor.norm_squared]
    if config.strict and missed:
        worst = min(missed, key=lambda tensor: tensor.kept / tensor.norm_squared)
        raise CheckFailed(
            f"{len(missed)} of {len(extracted)} modules keep less than the asked energy {config.rule.energy:g}",
            cause=f"{worst.name} {worst.reason}",
            fix="raise --rank or --budget, lower --energy, or leave out --strict",
            tensors=[tensor.name for tensor in missed],
        )
