"""An adapter as numbers to draw: each module's place, spectrum and kept energy, and energy against rank for all."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flora.adapter import Adapter

_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
LEVELS = (0.90, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class Spectrum:
    """One module: `energies` of its stored terms, descending, and what they are measured against."""

    name: str
    layer: int | None  # the first number of its name; None: it is in no numbered layer
    kind: str  # its name within a layer: self_attn.q_proj
    energies: tuple[float, ...]
    norm_squared: float  # of the change it was extracted from; without a record, of the stored factors
    kept: float  # of that, by all stored terms
    noise: float  # estimated part of it that is rounding of the tuned weights

    @property
    def rank(self) -> int:
        return len(self.energies)

    @property
    def kept_share(self) -> float:
        return self.kept / self.norm_squared if self.norm_squared else 1.0

    def kept_by_rank(self) -> list[float]:
        """Energy kept by the first 0, 1, …, rank terms. Dropping a term loses its own energy: terms are orthogonal."""
        lost = list(accumulate(reversed(self.energies), initial=0.0))
        return [0.0, *(self.kept - dropped for dropped in reversed(lost[:-1]))] if self.energies else [0.0]


@dataclass(frozen=True, slots=True)
class Curve:
    """Share of the change that `modules` keep when each has at most as many terms as the index says."""

    label: str
    shares: tuple[float, ...]  # by rank, from 0

    def rank_for(self, share: float) -> int | None:
        """The smallest rank that keeps `share`; None if no stored one does."""
        return next((rank for rank, kept in enumerate(self.shares) if kept >= share), None)


@dataclass(frozen=True, slots=True)
class Portrait:
    """An adapter's modules, and what they add up to. Shares are of squared norm, the whole change's."""

    modules: tuple[Spectrum, ...]

    @property
    def kinds(self) -> list[str]:
        """In the order in which a layer names them first."""
        return list(dict.fromkeys(module.kind for module in self.modules))

    @property
    def layers(self) -> list[int | None]:
        layers = {module.layer for module in self.modules}
        return [*sorted(layer for layer in layers if layer is not None), *([None] if None in layers else [])]

    @property
    def noise_share(self) -> float:
        total = sum(module.norm_squared for module in self.modules)
        return sum(module.noise for module in self.modules) / total if total else 0.0

    def whole(self) -> Curve:
        return curve("all modules", self.modules)

    def by_kind(self) -> list[Curve]:
        return [curve(kind, [module for module in self.modules if module.kind == kind]) for kind in self.kinds]

    def cells(self) -> Mapping[tuple[int | None, str], list[Spectrum]]:
        """Modules by layer and kind: one each, but where a layer holds several of a kind, as experts."""
        cells: dict[tuple[int | None, str], list[Spectrum]] = {}
        for module in self.modules:
            cells.setdefault((module.layer, module.kind), []).append(module)
        return cells


def curve(label: str, modules: Sequence[Spectrum]) -> Curve:
    total = sum(module.norm_squared for module in modules)
    length = max((module.rank for module in modules), default=0) + 1
    kept = [0.0] * length
    for module in modules:
        own = module.kept_by_rank()
        for rank in range(length):
            kept[rank] += own[min(rank, len(own) - 1)]
    return Curve(label, tuple(energy / total if total else 1.0 for energy in kept))


def portrait(adapter: Adapter) -> Portrait:
    """The numbers of a whole adapter, its factors read and put in SVD order."""
    from flora.lowrank import component_energies, is_svd_ordered, svd_order

    changes = adapter.report.by_name() if adapter.report else {}
    modules = []
    for module, factors in adapter:
        ordered = factors if is_svd_ordered(factors) else svd_order(factors)
        energies = sorted(component_energies(ordered).tolist(), reverse=True)
        change = changes.get(f"{module.name}.weight") or changes.get(module.name)
        layer, kind = place(module.name)
        total = sum(energies)
        modules.append(
            Spectrum(
                name=module.name,
                layer=layer,
                kind=kind,
                energies=tuple(energies),
                norm_squared=change.norm_squared if change else total,
                kept=change.kept if change else total,
                noise=change.noise if change else 0.0,
            )
        )
    modules.sort(key=lambda module: (module.layer is None, module.layer or 0))
    return Portrait(tuple(modules))


def place(name: str) -> tuple[int | None, str]:
    """`model.layers.3.mlp.up_proj` -> (3, `mlp.up_proj`). Later numbers, as of experts, become `*`."""
    found = _LAYER.search(name)
    if found is None:
        return None, name
    return int(found[1]), re.sub(r"(?<![^.])\d+(?![^.])", "*", name[found.end() :]) or name[: found.start()]
