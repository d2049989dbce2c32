"""Whether low rank is the right tool: each tensor's change in a word, and the whole change's by what holds most of it.

    unchanged       equal bits
    low_rank        most of it stands out of the noise in few directions, or the adapter keeps most of it
    cut_short       the rank ends while further directions still stand out: a higher one buys more
    sparse          few elements differ and they form no low rank: what reinforcement learning leaves (arXiv:2505.11711)
    near_full_rank  no direction stands out much: no rank worth storing holds this

Shares are of what is attainable: the change less the storage noise, which no low rank can hold. The noise is estimated,
and an upper bound where changes are of one ulp: where it leaves little of the change, shares are of the whole.
"""

import math
from collections.abc import Iterator
from typing import Literal

from flora.adapter import ChangeReport, TensorChange

Kind = Literal["unchanged", "low_rank", "cut_short", "sparse", "near_full_rank"]

KEPT = 0.8  # of the attainable energy, by at most half of the terms there are: low rank fits, whatever the spectrum
SIGNAL = 0.5  # of the attainable energy, in directions that stand out
REAL = 0.25  # of the change: less of it is no attainable energy to measure by, and any rank keeps as much of noise
SPARSE = 1 / 3  # of the elements; rounding to bf16 alone leaves well over this share of a full fine-tune changed
WRONG_TOOL: tuple[Kind, ...] = ("sparse", "near_full_rank")


def diagnose(change: TensorChange) -> Kind | None:
    """The kind of one tensor's change; None if it was not extracted or its spectrum not recorded (an import)."""
    if change.status == "unchanged" or change.norm_squared == 0:
        return "unchanged"
    if change.status != "extracted" or change.changed_share is None:
        return None
    whole = _energy_to_keep(change)
    keeps_most = change.kept >= KEPT * whole
    stands_out = change.signal_rank is not None and change.signal_energy >= SIGNAL * whole
    if (keeps_most and _is_low(change.rank, change)) or (stands_out and _is_low(change.signal_rank, change)):
        return "low_rank"
    if change.changed_share <= SPARSE:
        return "sparse"
    return "cut_short" if change.signal_rank is None and _is_low(change.rank, change) else "near_full_rank"


def _is_low(rank: int | None, change: TensorChange) -> bool:
    """Whether so many terms are fewer numbers than the matrix itself has, square or not."""
    side = min(change.shape[0], math.prod(change.shape[1:]))
    return rank is not None and rank <= max(1, side // 2)


def attainable(change: TensorChange) -> float:
    """Energy of the change that is not storage noise."""
    return max(change.norm_squared - change.noise, 0.0)


def _energy_to_keep(change: TensorChange) -> float:
    """What shares of a tensor's change are of."""
    energy = attainable(change)
    return energy if energy >= REAL * change.norm_squared else change.norm_squared


def noise_share(report: ChangeReport) -> float:
    """Storage noise of the extracted tensors over their change: the part of it that no rank is worth keeping."""
    extracted = [tensor for tensor in report.tensors if tensor.status == "extracted"]
    total = sum(tensor.norm_squared for tensor in extracted)
    return sum(tensor.noise for tensor in extracted) / total if total else 0.0


def kinds(report: ChangeReport) -> dict[Kind, float]:
    """Share of the extracted tensors' change by kind, largest first; `unchanged` alone if nothing differs."""
    if report.norm_squared == 0:
        return {"unchanged": 1.0}
    energies: dict[Kind, float] = {}
    for kind, change in _judged(report):
        energies[kind] = energies.get(kind, 0.0) + change.norm_squared
    total = sum(energies.values())
    return {kind: energy / total for kind, energy in sorted(energies.items(), key=lambda entry: -entry[1])}


def diagnose_report(report: ChangeReport) -> Kind | None:
    """The kind that holds most of the extracted change; None where no spectrum was recorded."""
    return next(iter(kinds(report)), None)


def _judged(report: ChangeReport) -> Iterator[tuple[Kind, TensorChange]]:
    for change in report.tensors:
        kind = diagnose(change)
        if kind is not None and change.status == "extracted":
            yield kind, change
