"""Several changes of one matrix as one: sum, TIES and DARE on deltas, and the factor-wise sum that PEFT calls linear.

With Δᵢ = sᵢ Bᵢ Aᵢ and weights wᵢ:

    svd     Σ wᵢ Δᵢ, exactly: [w₁s₁B₁ … wₖsₖBₖ] [A₁; …; Aₖ], in factor space
    linear  (Σ √|wᵢsᵢ| Bᵢ) (Σ ± √|wᵢsᵢ| Aᵢ): the rank stays, but terms Bᵢ Aⱼ of no model come in   (PEFT's `linear`)
    ties    of the largest `density` of each wᵢΔᵢ, element by element the mean of those that have the sign of their sum
    dare    Σ wᵢ Mᵢ ∘ Δᵢ / density, where Mᵢ keeps each element with probability `density`

TIES: arXiv:2306.01708; DARE: arXiv:2311.03099. Both go through the matrix itself, one at a time: neither has low rank.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from flora.errors import UsageError
from flora.lowrank import LowRank

Method = Literal["svd", "linear", "ties", "dare"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True, slots=True)
class Combination:
    """How changes are made one."""

    method: Method = "svd"
    density: float = 0.2  # ties, dare: share of each delta's elements that counts. TIES' own choice
    seed: int = 0  # dare: of what is dropped

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"{self.method!r} is no way to merge", fix=f"give one of {', '.join(METHODS)}")
        if not 0 < self.density <= 1:
            raise UsageError(
                f"density {self.density} is not a share", fix="give --density between 0 and 1, such as 0.2"
            )

    @property
    def is_low_rank(self) -> bool:
        """Whether the result is a product of thin factors, exactly."""
        return self.method in ("svd", "linear")


@dataclass(frozen=True, slots=True, eq=False)
class Term:
    """One adapter's part in a module."""

    factors: LowRank
    weight: float


def exact_sum(terms: Sequence[Term]) -> LowRank:
    """Σ weight * scale * B @ A as factors in float64, of the ranks' sum."""
    return LowRank(
        A=torch.cat([term.factors.A.double() for term in terms]),
        B=torch.cat([term.weight * term.factors.scale * term.factors.B.double() for term in terms], dim=1),
    )


def linear_sum(terms: Sequence[Term]) -> LowRank:
    """The factors themselves added up, in float64, as PEFT does. Raises UsageError if their ranks differ."""
    ranks = sorted({term.factors.rank for term in terms})
    if len(ranks) > 1:
        raise UsageError(
            f"factors of ranks {ranks[0]} and {ranks[-1]} cannot be added up",
            cause="linear adds the factors themselves, term by term",
            fix="--method svd adds what they stand for, whatever their ranks",
        )
    shares = [term.weight * term.factors.scale for term in terms]
    A = [
        math.copysign(math.sqrt(abs(share)), share) * term.factors.A.double()
        for share, term in zip(shares, terms, strict=True)
    ]
    B = [math.sqrt(abs(share)) * term.factors.B.double() for share, term in zip(shares, terms, strict=True)]
    return LowRank(A=_add_up(A), B=_add_up(B))


def low_rank(terms: Sequence[Term], combination: Combination) -> LowRank:
    """The result of a method whose result is thin factors, in float64."""
    return linear_sum(terms) if combination.method == "linear" else exact_sum(terms)


def dense(terms: Sequence[Term], combination: Combination, name: str) -> Tensor:
    """The result of any method as a matrix [out, in], float32.

    name  of the module: what DARE drops depends on it, on the seed and on the place in `terms`
    """
    if combination.method == "linear":
        return linear_sum(terms).delta()
    deltas = [term.factors.delta().mul_(term.weight) for term in terms]
    if combination.method == "ties":
        return _ties(deltas, combination.density)
    if combination.method == "dare":
        for place, delta in enumerate(deltas):
            _drop(delta, combination.density, _generator(combination.seed, place, name))
    return _add_up(deltas)


def _add_up(deltas: list[Tensor]) -> Tensor:
    total = deltas[0]
    for delta in deltas[1:]:
        total += delta
    return total


def _ties(deltas: list[Tensor], density: float) -> Tensor:
    """Trim, elect a sign, and average what agrees with it."""
    for delta in deltas:
        _trim(delta, density)
    elected = sum(deltas, start=torch.zeros_like(deltas[0])).sign()
    elected[elected == 0] = 1.0  # PEFT's choice, which no element that is not zero can need
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta in deltas:
        agrees = delta.sign() == elected
        total += delta * agrees
        count += agrees
    return total.div_(count.clamp_min_(1))


def _trim(delta: Tensor, density: float) -> None:
    """Zeroes all but the largest `density` of the elements, in place."""
    num_kept = int(density * delta.numel())
    if num_kept == delta.numel():
        return
    if num_kept == 0:
        delta.zero_()
        return
    sizes = delta.abs()
    edge = sizes.flatten().kthvalue(delta.numel() - num_kept + 1).values
    delta *= sizes >= edge


def _drop(delta: Tensor, density: float, generator: torch.Generator) -> None:
    """Keeps each element with probability `density` and scales it up by as much, in place."""
    delta *= torch.rand(delta.shape, generator=generator) < density
    delta /= density


def _generator(seed: int, place: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{place}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
