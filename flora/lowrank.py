"""Arithmetic on low-rank factors: no files, no devices, no names."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Cosine below which two stored vectors count as orthogonal: over twice the unit roundoff (bf16: 2**-9, fp16: 2**-11,
# fp8: 2**-4).
_ORTHOGONAL = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float8_e4m3fn: 0.15}
_ORTHOGONAL_FP32 = 1e-4
_NEGLIGIBLE = 1e-7  # of the largest energy: terms so small are subnormal in fp16, and their directions are rounding


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """One module's factors: delta ≈ scale * B @ A."""

    A: Tensor  # [rank, in_features]
    B: Tensor  # [out_features, rank]
    scale: float = 1.0  # alpha / rank, in PEFT's terms

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def in_features(self) -> int:
        return self.A.shape[1]

    @property
    def out_features(self) -> int:
        return self.B.shape[0]

    @property
    def num_bytes(self) -> int:
        return self.rank * self.bytes_per_rank

    @property
    def bytes_per_rank(self) -> int:
        return self.in_features * self.A.element_size() + self.out_features * self.B.element_size()

    def delta(self) -> Tensor:
        """scale * B @ A in float32, [out_features, in_features]."""
        return self.scale * (self.B.float() @ self.A.float())


def split_svd(U: Tensor, S: Tensor, Vh: Tensor, dtype: torch.dtype) -> LowRank:
    """Factors with sqrt(S) on either side, so that neither loses more than the other when stored in `dtype`.

    U [out, r], S [r] descending, Vh [r, in].  The largest entry of each column of U is made positive: a singular
    vector's sign is LAPACK's whim, and equal deltas shall give equal bytes.
    """
    root = S.clamp_min(0).sqrt()
    signs = U.gather(0, U.abs().argmax(0, keepdim=True)).squeeze(0).sign()
    return LowRank(
        A=((signs * root)[:, None] * Vh).to(dtype).contiguous(), B=(U * (signs * root)).to(dtype).contiguous()
    )


def component_energies(factors: LowRank) -> Tensor:
    """Squared norm of each rank-one term, float64 [rank]; in SVD order, the squared singular values."""
    a, b = factors.A.double(), factors.B.double()
    return factors.scale**2 * a.square().sum(1) * b.square().sum(0)


def norm_squared(factors: LowRank) -> float:
    """Squared Frobenius norm of scale * B @ A, from two [rank, rank] Gram matrices in float64."""
    a, b = factors.A.double(), factors.B.double()
    return float(factors.scale**2 * ((b.T @ b) * (a @ a.T)).sum())


def difference_norm_squared(left: LowRank, right: LowRank) -> float:
    """Squared Frobenius norm of left - right, in factor space and float64."""
    A = torch.cat([left.A.double(), right.A.double()])
    B = torch.cat([left.scale * left.B.double(), -right.scale * right.B.double()], dim=1)
    return max(norm_squared(LowRank(A=A, B=B)), 0.0)


def is_svd_ordered(factors: LowRank) -> bool:
    """Whether A's rows and B's columns are each orthogonal, within rounding, and their energies descend."""
    if factors.rank <= 1:
        return True
    energies = component_energies(factors)
    floor = _NEGLIGIBLE * energies.max()
    if bool((energies[1:] > energies[:-1] * 1.01 + floor).any()):
        return False
    counts = energies > floor
    tolerance = _ORTHOGONAL.get(factors.A.dtype, _ORTHOGONAL_FP32)
    return all(_largest_cosine(rows.double()[counts]) < tolerance for rows in (factors.A, factors.B.T))


def svd_order(factors: LowRank) -> LowRank:
    """The same product in SVD order, scale folded in: two QR factorizations and an SVD of [rank, rank], in float64.

    A rank over in_features or out_features falls to the smaller of them. What was fp8 comes back as bf16: a narrow
    format needs a scale of its own for each side.
    """
    dtype = torch.bfloat16 if factors.A.dtype == torch.float8_e4m3fn else factors.A.dtype
    q_b, r_b = torch.linalg.qr(factors.B.double())
    q_a, r_a = torch.linalg.qr(factors.A.double().T)
    U, S, Vh = torch.linalg.svd(factors.scale * (r_b @ r_a.T), full_matrices=False)
    return split_svd(q_b @ U, S, Vh @ q_a.T, dtype)


def trim(factors: LowRank, rank: int) -> LowRank:
    """The leading `rank` terms of factors in SVD order; scale stays."""
    return LowRank(A=factors.A[:rank].contiguous(), B=factors.B[:, :rank].contiguous(), scale=factors.scale)


def pad(factors: LowRank, rank: int) -> LowRank:
    """Zero terms up to `rank`; the product stays."""
    extra = rank - factors.rank
    if extra < 0:
        raise ValueError(f"cannot pad rank {factors.rank} down to {rank}")
    return LowRank(
        A=torch.nn.functional.pad(factors.A, (0, 0, 0, extra)),
        B=torch.nn.functional.pad(factors.B, (0, extra)),
        scale=factors.scale,
    )


def _largest_cosine(rows: Tensor) -> float:
    """The largest absolute cosine between two different rows; 0 for fewer than two."""
    unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    gram = (unit @ unit.T).fill_diagonal_(0)
    return float(gram.abs().max()) if gram.numel() else 0.0
