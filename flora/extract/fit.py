"""From singular vectors to factors as they are stored."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.extract.certificate import kept_by_rank
from flora.extract.factorize import Basis, wide
from flora.extract.products import times
from flora.lowrank import LowRank, trim


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """Stored factors in SVD order, and what each number of their leading terms keeps of the delta."""

    factors: LowRank
    kept: Tensor  # [rank] float64: ‖D‖² - ‖D - B_r A_r‖² for r = 1 … rank

    def trim(self, rank: int) -> "Fit":
        return Fit(trim(self.factors, rank), self.kept[:rank])


def fit(delta: Tensor, basis: Basis, rank: int, dtype: torch.dtype) -> Fit:
    """The first `rank` terms of delta [out, in] ≈ B @ A, stored in `dtype` on the CPU, and their certificate.

    The small side is sqrt(S) times its singular vectors, rounded to `dtype`; the large side is the least-squares
    partner of that rounded one, so rounding the small side costs nothing that the large one can make good. The product
    with D that this takes is the one that the certificate needs. Terms end, at none perhaps, where the rounded small
    side overflows or loses its rank.
    """
    stored, exponent = _round(basis.values[:rank].sqrt()[:, None] * basis.vectors[:rank], dtype)
    small = _ldexp(stored, exponent)
    L, first_bad = torch.linalg.cholesky_ex(small.double() @ small.double().T)
    rank = int(first_bad) - 1 if first_bad else rank
    stored, small, inverse = stored[:rank], small[:rank], torch.cholesky_inverse(L[:rank, :rank]).float()
    product = times(small, wide(delta))
    large, large_exponent = _round(torch.matmul(inverse, product, out=torch.empty_like(product)), dtype)
    kept = kept_by_rank(product, small, _ldexp(large, large_exponent)).cpu()
    A, B = (large, stored.T) if delta.shape[0] <= delta.shape[1] else (stored, large.T)
    scale = 2.0 ** (exponent + large_exponent)
    return Fit(LowRank(A=A.cpu().contiguous(), B=B.cpu().contiguous(), scale=scale), kept)


def _round(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """(stored, exponent) with rows ≈ stored * 2**exponent; the exponent is 0 but for fp8, whose range is narrow."""
    if dtype != torch.float8_e4m3fn or not rows.numel():
        return rows.to(dtype), 0
    largest = float(rows.abs().max())
    exponent = math.frexp(largest / torch.finfo(dtype).max)[1] if 0 < largest < math.inf else 0
    return (rows * 2.0**-exponent).to(dtype), exponent


def _ldexp(stored: Tensor, exponent: int) -> Tensor:
    return stored.float() * 2.0**exponent
