"""What the study compares: ways to make an adapter smaller, and how far each is taken."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

RANKS = (4, 8, 16, 32, 64, 128, 256)
ENERGIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
SIZES = (8, 32, 128)  # each the bytes of that uniform rank
STORED = 0.99  # kept energy of the adapter that is pruned

How = Literal["tuned", "base", "uncut", "rank", "energy", "prune", "budget", "module energy"]
Scope = Literal["linear", "all"]


@dataclass(frozen=True, slots=True)
class Level:
    """One row of the study.

    how    `tuned` and `base`: the checkpoints themselves; `uncut`: the base with the tuned tensors of the scope
           `rank`, `energy`: extracted so; `prune`: the adapter of energy 0.99, pruned
           `budget`, `module energy`: extracted to the bytes that the uniform rank `at` takes, by one budget over all
           modules, or by one energy for each module
    scope  `linear`: linear layers; `all`: embeddings as factors too, and norms whole
    at     the rank or the energy
    """

    how: How
    scope: Scope | None = None
    at: float | None = None


def levels() -> Iterator[Level]:
    """All of them."""
    yield Level("tuned")
    yield Level("base")
    yield Level("uncut", "linear")
    for rank in RANKS:
        yield Level("rank", "all", rank)
    for energy in ENERGIES:
        yield Level("energy", "all", energy)
        if energy < STORED:
            yield Level("prune", "all", energy)
    for rank in SIZES:
        yield Level("budget", "all", rank)
        yield Level("module energy", "all", rank)
    for rank in RANKS:
        yield Level("rank", "linear", rank)
    for energy in ENERGIES:
        yield Level("energy", "linear", energy)
