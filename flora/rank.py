"""How many singular values to keep: by energy, by rank, by stored bytes; and how many stand out of noise."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.errors import UsageError

_NEGLIGIBLE = 1e-6  # of the norm: rounding of float32, in which no direction stands out


@dataclass(frozen=True, slots=True)
class RankRule:
    """What the user asked to keep. Each given rule is a cap of its own; `energy` is also a floor on what is kept."""

    max_rank: int | None = None
    energy: float | None = None  # share of a module's squared delta norm
    budget_bytes: int | None = None  # of stored factors, all modules together

    def __post_init__(self) -> None:
        if self.max_rank is not None and self.max_rank < 1:
            raise UsageError(f"rank {self.max_rank} keeps nothing", fix="give --rank 1 or more")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"energy {self.energy} is not a share", fix="give --energy between 0 and 1, such as 0.95")
        if self.budget_bytes is not None and self.budget_bytes < 1:
            raise UsageError(f"a budget of {self.budget_bytes} bytes keeps nothing", fix="give --budget such as 100MB")

    @property
    def is_empty(self) -> bool:
        return self.max_rank is None and self.energy is None and self.budget_bytes is None


def rank_for_energy(singular_values: Tensor, norm_squared: float, energy: float) -> int:
    """Smallest rank that keeps `energy` of the delta's squared norm, or all of [k] when none does.

    singular_values  [k], descending;  norm_squared  of the whole delta, since a truncated SVD does not see its tail.
    """
    if norm_squared == 0:
        return 0
    kept = singular_values.double().square().cumsum(0)
    return min(int((kept < energy * norm_squared).sum()) + 1, len(kept))


def signal_rank(singular_values: Tensor, norm_squared: float, shape: tuple[int, ...]) -> int | None:
    """How many leading terms stand above what white noise of the remaining energy would show; None if all of [k] do.

    singular_values  [k], descending, of a matrix of `shape` and squared norm `norm_squared`

    White noise of variance v in [m, n] has its largest squared singular value near v (√m + √n)² (Marchenko, Pastur).
    The noise is what the signal leaves, and the signal what stands above the noise: from no signal on, until it holds.
    The edge of a finite matrix fluctuates by about min(m, n)^(-2/3) of itself, so it counts as that much higher.
    """
    squares = singular_values.double().square()
    m, n = shape
    rank = 0
    while rank < min(m, n):
        variance = max(norm_squared - float(squares[:rank].sum()), 0.0) / ((m - rank) * (n - rank))
        edge = variance * (math.sqrt(m - rank) + math.sqrt(n - rank)) ** 2 * (1 + min(m, n) ** (-2 / 3))
        found = int((squares > edge).sum())
        if found <= rank:
            return rank
        rank = found
        if rank == len(squares) < min(m, n):
            rest = norm_squared - float(squares.sum())
            return None if rest > _NEGLIGIBLE * norm_squared else rank
    return rank


def ranks_for_budget(
    energies: Mapping[str, Tensor], bytes_per_rank: Mapping[str, int], budget_bytes: int
) -> dict[str, int]:
    """Ranks that keep the most energy in `budget_bytes`: all terms sorted by energy per byte, cut once.

    energies  squared singular values of each module, descending [k];  bytes_per_rank  what one more rank of it costs.
    A module's terms descend, so the cut takes a prefix of each. PARA (arXiv:2604.27796) cuts likewise.
    """
    names = sorted(energies)
    if not names:
        return {}
    values = torch.cat([energies[name].double() / bytes_per_rank[name] for name in names])
    costs = torch.cat([torch.full((len(energies[name]),), bytes_per_rank[name], dtype=torch.int64) for name in names])
    owners = torch.cat([torch.full((len(energies[name]),), i, dtype=torch.int64) for i, name in enumerate(names)])
    order = torch.argsort(values, descending=True, stable=True)
    taken = order[(costs[order].cumsum(0) <= budget_bytes) & (values[order] > 0)]
    counts = torch.bincount(owners[taken], minlength=len(names))
    return {name: int(counts[i]) for i, name in enumerate(names)}
