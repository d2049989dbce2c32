"""Pruning: the same adapter with fewer terms, and a report of what the rest keeps.

Energy is measured against the norm of the delta as it was recorded at extraction (for an import: of the imported
factors). Factors in SVD order are sliced; others go through QR and a small SVD first.

The certificate. Let D be the delta, T the stored product and t the terms dropped from it. Then

    |D - (T - t)|² = |D - T|² + |t|² + 2 <D - T, t>

Extraction leaves D - T orthogonal to T's terms but for the rounding of the factors, so the last product is of the order
u |t| (|D| + |T|) at most, for a unit roundoff u (2⁻⁹ in bf16), and in practice far below: roundings do not know D. The
terms are orthogonal to each other likewise, so |t|² is the sum of their energies: these sums, and with them the choice
of ranks, come out the same whether an adapter is pruned in one step or in several.

Rounding to fp8 is too rough for that: the last product was seen to reach 4e-3 of |D|². There extraction's report has
what each number of terms keeps, certified one by one, and pruning reads it off.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import msgspec

from flora.adapter import Adapter, ChangeReport, Recipe, TensorChange, make_adapter, report_of_factors
from flora.errors import UsageError
from flora.lowrank import LowRank, component_energies, difference_norm_squared, is_svd_ordered, svd_order, trim
from flora.rank import RankRule, ranks_for_budget

_SLACK = 1e-12  # of the norm: sums of float64 taken in another order must not change a rank


@dataclass(frozen=True, slots=True, eq=False)
class _Prunable:
    """One module, its terms in SVD order, and what any number of them keeps."""

    factors: LowRank
    norm_squared: float  # of the reference
    kept: tuple[float, ...]  # by the first 0, 1, … rank terms

    @property
    def rank(self) -> int:
        return self.factors.rank

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps `energy` of the reference; all if none does."""
        target = energy * self.norm_squared - _SLACK * self.norm_squared
        return next((rank for rank, kept in enumerate(self.kept) if kept >= target), self.rank)


def prune(adapter: Adapter, rule: RankRule, parent_digest: str | None) -> Adapter | None:
    """The adapter with the ranks that `rule` leaves, or None if it would cut nothing.

    parent_digest  version digest of `adapter`, for the lineage; None if it has none yet

    Pruning to some energy twice is pruning once, and pruning by steps is pruning to the last: the same factors, hence
    the same serving digest. Raises UsageError if the rule is empty or would leave nothing.
    """
    if rule.is_empty:
        raise UsageError("nothing says how far to prune", fix="give --energy, --rank or --budget")
    report = adapter.report or report_of_factors(adapter.factors)
    changes = report.by_name()
    modules = {name: _prepare(lowrank, changes.get(f"{name}.weight")) for name, lowrank in adapter.factors.items()}
    ranks = _choose_ranks(modules, rule)
    cut = {name for name, rank in ranks.items() if rank < modules[name].rank}
    if not cut:
        return None
    if not any(ranks.values()):
        raise UsageError("this would leave no module at all", fix="give a larger --budget or --energy")
    header = adapter.header
    return make_adapter(
        # a module that loses nothing keeps its very bytes
        {name: trim(modules[name].factors, ranks[name]) if name in cut else adapter.factors[name] for name in ranks},
        header.base,
        _recipe(header.recipe, rule, parent_digest),
        _update(report, {name: (ranks[name], modules[name].kept[ranks[name]]) for name in cut}),
        adapter.extras,
        header.bench_salt,
        forms=header.forms,
        exact=adapter.exact,
        first_rows=header.first_rows,
    )


def _prepare(stored: LowRank, change: TensorChange | None) -> _Prunable:
    """The module in SVD order. `change` is its line in the report; without one, it is its own reference."""
    if change is None:
        (change,) = report_of_factors({"": stored}).tensors
    if change.kept_by_rank is not msgspec.UNSET and len(change.kept_by_rank) == stored.rank:
        return _Prunable(stored, change.norm_squared, (0.0, *change.kept_by_rank))
    ordered = stored if is_svd_ordered(stored) else svd_order(stored)
    lost = 0.0 if ordered is stored else difference_norm_squared(stored, ordered)  # by rounding the new factors
    dropped = list(accumulate(reversed(component_energies(ordered).tolist()), initial=0.0))
    kept = [change.kept - lost - energy for energy in reversed(dropped)]
    return _Prunable(ordered, change.norm_squared, (0.0, *kept[1:]))


def _choose_ranks(modules: Mapping[str, _Prunable], rule: RankRule) -> dict[str, int]:
    ranks = {name: module.rank for name, module in modules.items()}
    if rule.energy is not None:
        ranks = {name: module.rank_for(rule.energy) for name, module in modules.items()}
    if rule.max_rank is not None:
        ranks = {name: min(rank, rule.max_rank) for name, rank in ranks.items()}
    if rule.budget_bytes is not None:
        energies = {name: component_energies(modules[name].factors)[:rank] for name, rank in ranks.items()}
        bytes_per_rank = {name: module.factors.bytes_per_rank for name, module in modules.items()}
        ranks = ranks_for_budget(energies, bytes_per_rank, rule.budget_bytes)
    return ranks


def _update(report: ChangeReport, cut: Mapping[str, tuple[int, float]]) -> ChangeReport:
    """The report with (rank, kept) of each module that was cut."""
    tensors = []
    for tensor in report.tensors:
        if (new := cut.get(tensor.name.removesuffix(".weight"))) is not None and tensor.status == "extracted":
            left = tensor.kept_by_rank if tensor.kept_by_rank is msgspec.UNSET else tensor.kept_by_rank[: new[0]]
            tensor = msgspec.structs.replace(tensor, rank=new[0], kept=new[1], kept_by_rank=left)
        tensors.append(tensor)
    return ChangeReport(tensors=tuple(tensors))


def _recipe(parent: Recipe, rule: RankRule, parent_digest: str | None) -> Recipe:
    options = {"rank": rule.max_rank, "energy": rule.energy, "budget_bytes": rule.budget_bytes}
    return Recipe(
        operation="prune",
        options={name: value for name, value in options.items() if value is not None},
        tuned_name=parent.tuned_name,
        tuned_id=parent.tuned_id,
        parents=(parent_digest,) if parent_digest else (),
    )
