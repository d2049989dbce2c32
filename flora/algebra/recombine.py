"""Factors of a combination, as they are stored, with the proof of what they lost: in factor space where that is exact.

The sum of k adapters has at most the rank of all of them together, so no matrix of the module's size is formed: QR of
the stacked factors, an SVD as small as the ranks' sum, and for the proof the same again on sum minus stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.algebra.combine import Combination, Term, dense, exact_sum, low_rank
from flora.errors import Unsupported
from flora.extract.factorize import factorize, wide
from flora.extract.fit import fit
from flora.lowrank import LowRank, svd_order

_NOTHING = 1e-7  # of the largest singular value: below, a term is rounding of the factors it came from


@dataclass(frozen=True, slots=True, eq=False)
class Recombined:
    """One module of the result, and how far it is from what was asked. Norms are squared, of whole matrices."""

    factors: LowRank
    norm_squared: float  # of the method's own result; for `linear` of the exact sum, which it approximates
    residual_squared: float  # of that less the stored factors
    sum_norm_squared: float  # of Σ weight * delta
    distance_squared: float  # of that sum less the stored factors


def recombine(
    terms: Sequence[Term], combination: Combination, name: str, max_rank: int, dtype: torch.dtype
) -> Recombined:
    """The combination as stored factors of at most `max_rank`, in SVD order. Raises UsageError, Unsupported."""
    total = exact_sum(terms)
    if combination.is_low_rank:
        result = total if combination.method == "svd" else low_rank(terms, combination)
        stored = _store(result, max_rank, dtype)
        norm, residual = product_norm_squared(total), difference_squared(total, stored)
        found = Recombined(stored, norm, residual, norm, residual)
    else:
        target = dense(terms, combination, name)
        stored, norm, kept = _approximate(target, max_rank, dtype, combination.seed)
        distance = difference_squared(total, stored)
        found = Recombined(stored, norm, norm - kept, product_norm_squared(total), distance)
    if not all(bool(torch.isfinite(side).all()) for side in (stored.A, stored.B)):
        raise Unsupported(
            f"the merged factors of {name} do not fit into {str(dtype).removeprefix('torch.')}",
            fix="give smaller weights",
            tensor=name,
        )
    return found


def measure_again(
    found: Recombined, cut: LowRank, terms: Sequence[Term], combination: Combination, kept: float
) -> Recombined:
    """The module with fewer terms, proved anew against the exact sum.

    kept  by the fewer terms as pruning says; taken for TIES and DARE, whose own result is no product of thin factors
    """
    distance = difference_squared(exact_sum(terms), cut)
    residual = distance if combination.is_low_rank else found.norm_squared - kept
    return Recombined(cut, found.norm_squared, residual, found.sum_norm_squared, distance)


def product_norm_squared(factors: LowRank) -> float:
    """‖scale * B @ A‖² in float64, by QR of either side: Gram matrices would lose half the digits of a small one."""
    _, r_b = torch.linalg.qr(factors.B.double(), mode="r")
    _, r_a = torch.linalg.qr(factors.A.double().T, mode="r")
    return float((factors.scale * (r_b @ r_a.T)).square().sum())


def difference_squared(left: LowRank, right: LowRank) -> float:
    """‖left - right‖², likewise."""
    A = torch.cat([left.A.double(), right.A.double()])
    B = torch.cat([left.scale * left.B.double(), -right.scale * right.B.double()], dim=1)
    return product_norm_squared(LowRank(A=A, B=B))


def _store(factors: LowRank, max_rank: int, dtype: torch.dtype) -> LowRank:
    """Factors in float64 as their leading terms in SVD order, those that are more than rounding, in `dtype`."""
    ordered = svd_order(factors)
    sizes = ordered.A.norm(dim=1) * ordered.B.norm(dim=0)
    rank = min(max_rank, int((sizes > _NOTHING * sizes.max()).sum()))
    return LowRank(A=ordered.A[:rank].to(dtype).contiguous(), B=ordered.B[:, :rank].to(dtype).contiguous())


def _approximate(target: Tensor, max_rank: int, dtype: torch.dtype, seed: int) -> tuple[LowRank, float, float]:
    """Factors of a dense [out, in] matrix, its squared norm, and what of it they keep as stored."""
    norm_squared = float(torch.linalg.vector_norm(target, dtype=torch.float64)) ** 2
    if norm_squared == 0:
        empty = LowRank(A=target.new_zeros(0, target.shape[1]), B=target.new_zeros(target.shape[0], 0))
        return LowRank(A=empty.A.to(dtype), B=empty.B.to(dtype)), 0.0, 0.0
    basis = factorize(
        wide(target),
        norm_squared,
        max_rank=min(max_rank, *target.shape),
        energy=None,
        exact=False,
        seed=str(seed),
    )
    fitted = fit(target, basis, len(basis.values), dtype)
    return fitted.factors, norm_squared, float(fitted.kept[-1])
