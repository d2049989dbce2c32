"""How many terms of a module to keep, judged by the certificate of the stored factors."""

from torch import Tensor

from flora.rank import RankRule

NEGLIGIBLE = 1e-8  # share of the norm: terms that add less only store rounding noise
_SPARE_TERMS = 2  # fitted beyond the rank that exact factors would need, since rounding takes its part


def terms_to_fit(needed: int, available: int) -> int:
    """How many terms to fit so that the stored ones reach what `needed` exact ones hold."""
    return min(available, needed + _SPARE_TERMS + needed // 16)


def smallest_rank(kept: Tensor, norm_squared: float, energy: float | None) -> int:
    """The fewest leading terms that keep `energy`; where none do or none is asked, all that add anything.

    kept  [rank] float64, energy kept by 1, 2, … stored terms
    """
    if energy is not None and bool((kept >= energy * norm_squared).any()):
        return int((kept >= energy * norm_squared).nonzero()[0]) + 1
    return int((kept >= kept.max() - NEGLIGIBLE * norm_squared).nonzero()[0]) + 1


def shortfall(
    kept_share: float, rule: RankRule, *, rank: int, cap: int, side: int, cut: bool, dtype: str
) -> str | None:
    """Why a module keeps less than the rule's energy, in words for the report; None if it does not, or none is asked.

    rank  kept;  cap  the most that the rule allowed it;  side  its smaller side, no delta has a higher rank
    cut   whether the budget took terms from it
    """
    if rule.energy is None or kept_share >= rule.energy:
        return None
    missed = f"keeps {kept_share:.4f} of its energy, not {rule.energy:g}: "
    if cut or (rank == cap < side and cap != rule.max_rank):
        return missed + "the budget ends here"
    if rank == cap < side:
        return missed + f"capped at rank {cap}"
    return missed + f"every term is kept, and rounding to {dtype} takes the rest"
