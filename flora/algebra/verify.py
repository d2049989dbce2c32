"""Proof without trust: what a stored adapter keeps of a pair, computed anew from the two checkpoints' own numbers.

Nothing of extraction's arithmetic is used. The residual is formed element by element, in float64:

    ‖D - sBA‖² = Σ_rows |tuned - base - s (B A)|²,   kept = ‖D‖² - ‖D - sBA‖²

where a certificate takes it from three products as thin as the rank (`extract/certificate.py`).
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.adapter import Adapter, Module, TensorChange
from flora.algebra.places import as_matrix, tensor_name
from flora.checkpoint import Checkpoint, TensorInfo
from flora.errors import BaseMismatch, CheckpointError, ShapeMismatch
from flora.extract.delta import count_differing
from flora.extract.experts import stored_names
from flora.extract.pair import TensorPair
from flora.extract.pairs import match_names
from flora.extract.regroup import readable_pair
from flora.lowrank import LowRank

TOLERANCE = 5e-4  # of a tensor's energy; a certificate's own sums and a pruning's rounding stay well below
_CHUNK = 1 << 20  # elements held in float64 at once
_PIECE = 16 << 20  # bytes hashed at once


@dataclass(frozen=True, slots=True)
class Verified:
    """One tensor of the pair: its change and what the adapter keeps of it, recomputed and as the record says."""

    name: str
    rank: int  # 0: the adapter does not touch it
    norm_squared: float
    residual_squared: float  # of the change less the factors' product
    certified: TensorChange | None  # the record's line; None where there is no record of this pair
    tolerance: float

    @property
    def kept(self) -> float:
        return self.norm_squared - self.residual_squared

    @property
    def kept_share(self) -> float | None:
        """Of the change's energy; below zero where the adapter makes it worse, None where nothing changed."""
        return self.kept / self.norm_squared if self.norm_squared else None

    @property
    def certified_share(self) -> float | None:
        known = self.certified
        return known.kept / known.norm_squared if known and known.norm_squared else None

    @property
    def is_extracted(self) -> bool:
        """Whether this is one of the adapter's modules, a budget having left it without terms perhaps."""
        return self.rank > 0 or (self.certified is not None and self.certified.status == "extracted")

    @property
    def holds(self) -> bool:
        """Whether the record's norm and kept energy are these, within the tolerance; true where there is no record."""
        if self.certified is None:
            return True
        room = self.tolerance * max(self.norm_squared, self.certified.norm_squared)
        return (
            abs(self.certified.norm_squared - self.norm_squared) <= room
            and abs(self.certified.kept - self.kept) <= room
        )


@dataclass(frozen=True, slots=True)
class Verification:
    """Every tensor of the pair, in the order of names."""

    tensors: tuple[Verified, ...]
    has_certificate: bool  # the adapter's record is of a pair, and not of an import or a merge
    unaccounted: tuple[str, ...]  # tensors that changed and of which the record says nothing

    @property
    def kept_share(self) -> float:
        """Of the whole change."""
        return _share(self.tensors)

    @property
    def kept_share_of_modules(self) -> float:
        return _share([tensor for tensor in self.tensors if tensor.is_extracted])

    @property
    def failed(self) -> tuple[Verified, ...]:
        return tuple(tensor for tensor in self.tensors if not tensor.holds)

    @property
    def holds(self) -> bool:
        return not self.failed and not self.unaccounted


def verify(
    adapter: Adapter,
    base: Checkpoint,
    tuned: Checkpoint,
    tolerance: float = TOLERANCE,
    progress: Callable[[str, float], None] | None = None,
) -> Verification:
    """The adapter measured against the pair, one tensor in memory at a time; the record is compared, never used.

    progress  told each tensor's name as it is done, and the share of the pair's bytes read

    Raises BaseMismatch (a base tensor is not the one that the adapter was computed against, or none has its shape),
    ShapeMismatch, CheckpointError (the tuned checkpoint lacks a tensor that the adapter changes).
    """
    stored, (base, tuned) = base, readable_pair(base, tuned)
    pairs = [pair for pair in match_names(base.tensors, tuned.tensors)[0] if pair.base and pair.tuned]
    modules = {tensor_name(module, base.tensors): (module, factors) for module, factors in adapter}
    _check_complete(modules, pairs, tuned)
    has_certificate = adapter.report is not None and adapter.header.recipe.tuned_id is not None
    record = adapter.report.by_name() if adapter.report and has_certificate else {}
    total, done, found = sum(pair.num_bytes for pair in pairs), 0, []
    checked: set[str] = set()  # tensors of the base; one may hold many experts
    for pair in pairs:
        assert pair.base is not None
        touched = modules.get(pair.base.name)
        if touched is not None:
            for name in stored_names(base, pair.base.name):
                if name not in checked:
                    _check_base(stored.tensors[name], stored, adapter)
                    checked.add(name)
        if not (touched is None and _is_tied(pair, base, tuned)):
            found.append(_verify_pair(pair, base, tuned, touched, adapter, record.get(pair.name), tolerance))
        done += pair.num_bytes
        if progress:
            progress(pair.name, done / max(1, total))
    unaccounted = [t.name for t in found if has_certificate and t.norm_squared and t.name not in record]
    return Verification(tuple(found), has_certificate, tuple(unaccounted))


def _share(tensors: "tuple[Verified, ...] | list[Verified]") -> float:
    total = sum(tensor.norm_squared for tensor in tensors)
    return sum(tensor.kept for tensor in tensors) / total if total else 1.0


def _verify_pair(
    pair: TensorPair,
    base: Checkpoint,
    tuned: Checkpoint,
    touched: tuple[Module, LowRank] | None,
    adapter: Adapter,
    certified: TensorChange | None,
    tolerance: float,
) -> Verified:
    assert pair.base is not None
    assert pair.tuned is not None
    new_rows = pair.tuned.shape[0] - pair.base.shape[0] if pair.base.shape else 0
    if pair.base.shape[1:] != pair.tuned.shape[1:] or new_rows < 0 or (new_rows and touched):
        raise ShapeMismatch(
            f"{pair.name} is {list(pair.base.shape)} in the base, {list(pair.tuned.shape)} in {pair.tuned.file}",
            fix="give the two checkpoints that the adapter was extracted from",
            tensor=pair.name,
        )
    if touched is None and pair.buffer_reason is not None:  # counts for nothing, whatever an older record counted
        return Verified(pair.name, 0, 0.0, 0.0, None, tolerance)
    before, after = base.load(pair.base.name), tuned.load(pair.tuned.name)
    if touched is not None:
        module, factors = touched
        norm, residual = _norms(as_matrix(before, module), as_matrix(after, module), factors)
        return Verified(pair.name, factors.rank, norm, residual, certified, tolerance)
    norm, residual = _untouched(before, after, adapter.exact.get(pair.name))
    return Verified(pair.name, 0, norm, residual, certified, tolerance)


def _untouched(before: Tensor, after: Tensor, whole: Tensor | None) -> tuple[float, float]:
    """The same of a tensor without factors, which the adapter may carry whole; of a grown table, its new rows."""
    old_rows = before.shape[0] if before.dim() else 0
    if before.shape == after.shape:
        norm, residual = _norms(before, after, None)
        if not math.isfinite(norm) and count_differing(before, after) == 0:
            return 0.0, 0.0  # infinite on both sides, as masks are
        return norm, residual if whole is None else _norms(whole, after, None)[0]
    norm, residual = _norms(before, after[:old_rows], None)
    added, _ = _norms(torch.zeros_like(after[old_rows:]), after[old_rows:], None)
    missing = added if whole is None else _norms(whole, after[old_rows:], None)[0]
    return norm + added, residual + missing


def _norms(before: Tensor, after: Tensor, factors: LowRank | None) -> tuple[float, float]:
    """‖after - before‖² and ‖after - before - scale * B @ A‖², float64 element by element."""
    before, after = torch.atleast_1d(before), torch.atleast_1d(after)
    A = factors.A.double() if factors else None
    norm = residual = 0.0
    for rows in _row_chunks(after):
        delta = after[rows].double() - before[rows].double()
        norm += float(delta.square().sum())
        if factors is not None and A is not None:
            delta -= factors.scale * (factors.B[rows].double() @ A)
        residual += float(delta.square().sum())
    return norm, residual


def _row_chunks(tensor: Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK * tensor.shape[0] // max(1, tensor.numel()))
    return (slice(start, start + step) for start in range(0, tensor.shape[0], step))


def _check_base(info: TensorInfo, base: Checkpoint, adapter: Adapter) -> None:
    """Raises BaseMismatch if the record says by sha256 that the factors were computed against other stored bytes."""
    wanted = adapter.header.base.touched.get(info.name)
    if wanted is None:
        return
    found, left = hashlib.sha256(), info.num_bytes
    with info.file.open("rb") as file:
        file.seek(info.start)
        while left > 0 and (piece := file.read(min(left, _PIECE))):
            found.update(piece)
            left -= len(piece)
    if found.hexdigest() != wanted:
        raise BaseMismatch(
            f"{info.name} of {base.path} is not the tensor that this adapter was extracted from",
            cause=f"its sha256 is not the one that the adapter records for base {adapter.header.base.base_id}",
            fix=f"give the base that it was made for, {adapter.header.base.name}",
            tensor=info.name,
        )


def _is_tied(pair: TensorPair, base: Checkpoint, tuned: Checkpoint) -> bool:
    """Whether an output head is the token embedding again on both sides: its change counts there."""
    if pair.twin is None or pair.base is None or pair.tuned is None:
        return False
    sides = ((base, pair.base, pair.twin[0]), (tuned, pair.tuned, pair.twin[1]))
    return all(
        head.name == table.name or torch.equal(side.load(head.name), side.load(table.name))
        for side, head, table in sides
    )


def _check_complete(modules: "dict[str, tuple[Module, LowRank]]", pairs: list[TensorPair], tuned: Checkpoint) -> None:
    both = {pair.base.name for pair in pairs if pair.base}
    missing = sorted(modules.keys() - both)
    if missing:
        raise CheckpointError(
            f"{tuned.path} lacks {len(missing)} of the tensors that the adapter changes, {missing[0]} among them",
            fix="give the checkpoint that it was extracted from",
            tensor=missing[0],
        )
