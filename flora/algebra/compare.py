"""Two adapters told apart in factor space: no matrix of a module's size is formed.

Of each module's products L and R: the distance ‖L - R‖ over the larger of ‖L‖ and ‖R‖, the cosine <L, R> / ‖L‖‖R‖, and
the principal angles between the spaces that they write to (their columns) and those that they read from (their rows).
Angles from cosines alone lose half the digits near zero, so small ones come from sines (Björck, Golub 1973).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.adapter import Adapter
from flora.algebra.recombine import difference_squared, product_norm_squared
from flora.errors import BaseMismatch
from flora.extract.workers import choose_crew, in_order
from flora.lowrank import LowRank

_FACTOR_BYTES = 64 << 20  # about what one module's factors and their QR take in float64
_NOTHING = 1e-7  # of the largest singular value: a direction below it is rounding, and its angle says nothing


@dataclass(frozen=True, slots=True)
class ModuleComparison:
    """One module of either adapter. A rank of 0: that adapter leaves it as in the base."""

    name: str
    left_rank: int
    right_rank: int
    left_norm: float  # ‖scale * B @ A‖
    right_norm: float
    difference: float  # ‖left - right‖
    inner: float  # <left, right>
    output_angles: tuple[float, ...]  # degrees, ascending, between column spaces; as many as the smaller rank
    input_angles: tuple[float, ...]  # likewise between row spaces

    @property
    def distance(self) -> float:
        """0: equal; 1: as far as from nothing; 2: opposite."""
        return self.difference / max(self.left_norm, self.right_norm) if self.difference else 0.0

    @property
    def cosine(self) -> float | None:
        """None where one of them is nothing."""
        return _cosine(self.inner, self.left_norm, self.right_norm)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two adapters told apart module by module, and as one change each."""

    modules: tuple[ModuleComparison, ...]  # of either adapter, by name

    @property
    def distance(self) -> float:
        """Of all modules together."""
        difference = sum(module.difference**2 for module in self.modules) ** 0.5
        return difference / max(self.left_norm, self.right_norm) if difference else 0.0

    @property
    def cosine(self) -> float | None:
        return _cosine(sum(module.inner for module in self.modules), self.left_norm, self.right_norm)

    @property
    def left_norm(self) -> float:
        return sum(module.left_norm**2 for module in self.modules) ** 0.5

    @property
    def right_norm(self) -> float:
        return sum(module.right_norm**2 for module in self.modules) ** 0.5


def compare(left: Adapter, right: Adapter, progress: Callable[[str, float], None] | None = None) -> Comparison:
    """Every module of either adapter; `progress` is told each name as it is done, and the share of modules done.

    Raises BaseMismatch if a module has two shapes.
    """
    names = sorted(left.factors.keys() | right.factors.keys())

    def work(name: str) -> ModuleComparison:
        return _compare(name, left.factors.get(name), right.factors.get(name))

    found: list[ModuleComparison] = []
    for module in in_order(choose_crew(_FACTOR_BYTES, fewest=1), work, names):
        found.append(module)
        if progress:
            progress(module.name, len(found) / len(names))
    return Comparison(tuple(found))


def principal_angles(left: Tensor, right: Tensor) -> list[float]:
    """Angles between the spaces of orthonormal columns [n, p] and [n, q], in degrees, ascending; min(p, q) of them."""
    if left.shape[1] < right.shape[1]:
        left, right = right, left
    cosines = torch.linalg.svdvals(left.T @ right).clamp(0, 1)
    sines = torch.linalg.svdvals(right - left @ (left.T @ right)).flip(0).clamp(0, 1)  # ascending, as the angles
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos()).rad2deg().tolist()


def _compare(name: str, left: LowRank | None, right: LowRank | None) -> ModuleComparison:
    one = left if left is not None else right
    assert one is not None
    left, right = left or _nothing(one), right or _nothing(one)
    shapes = [(factors.out_features, factors.in_features) for factors in (left, right)]
    if shapes[0] != shapes[1]:
        raise BaseMismatch(
            f"{name} is {list(shapes[0])} in the one adapter and {list(shapes[1])} in the other",
            cause="they belong to bases of different shapes",
            fix="compare adapters of one base",
            tensor=name,
        )
    spaces = [_spaces(factors) for factors in (left, right)]
    return ModuleComparison(
        name=name,
        left_rank=left.rank,
        right_rank=right.rank,
        left_norm=product_norm_squared(left) ** 0.5,
        right_norm=product_norm_squared(right) ** 0.5,
        difference=difference_squared(left, right) ** 0.5,
        inner=_inner(left, right),
        output_angles=tuple(principal_angles(spaces[0][0], spaces[1][0])),
        input_angles=tuple(principal_angles(spaces[0][1], spaces[1][1])),
    )


def _nothing(like: LowRank) -> LowRank:
    return LowRank(A=like.A[:0], B=like.B[:, :0])


def _inner(left: LowRank, right: LowRank) -> float:
    """<left, right> = tr((B_lᵀ B_r)(A_r A_lᵀ)), float64."""
    outputs, inputs = left.B.double().T @ right.B.double(), left.A.double() @ right.A.double().T
    return float(left.scale * right.scale * (outputs * inputs).sum())


def _spaces(factors: LowRank) -> tuple[Tensor, Tensor]:
    """Orthonormal columns of what the product writes to and of what it reads from, float64."""
    q_b, r_b = torch.linalg.qr(factors.B.double())
    q_a, r_a = torch.linalg.qr(factors.A.double().T)
    U, S, Vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    rank = int((_NOTHING * S[0] < S).sum()) if len(S) else 0
    return q_b @ U[:, :rank], q_a @ Vh[:rank].T


def _cosine(inner: float, left_norm: float, right_norm: float) -> float | None:
    return inner / (left_norm * right_norm) if left_norm and right_norm else None
