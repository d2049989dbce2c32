"""From singular vectors to factors as they are stored."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flora.extract.certificate import kept_by_rank
from flora.extract.factorize import Basis, wide
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
    small = (basis.values[:rank].sqrt()[:, None] * basis.vectors[:rank]).to(dtype)
    L, first_bad = torch.linalg.cholesky_ex(small.double() @ small.double().T)
    rank = int(first_bad) - 1 if first_bad else rank
    small, inverse = small[:rank], torch.cholesky_inverse(L[:rank, :rank]).float()
    product = small.float() @ wide(delta)
    large = (inverse @ product).to(dtype)
    kept = kept_by_rank(product, small, large).cpu()
    A, B = (large, small.T) if delta.shape[0] <= delta.shape[1] else (small, large.T)
    return Fit(LowRank(A=A.cpu().contiguous(), B=B.cpu().contiguous()), kept)
