"""Several adapters of one base as one adapter, with its lineage and its certificate."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import torch
from torch import Tensor

from flora.adapter import Adapter, BaseBinding, ChangeReport, Module, Recipe, TensorChange, make_adapter
from flora.algebra.combine import Combination, Term
from flora.algebra.parts import Part, check_parts, merge_exact, merge_extras, modules_of, terms_of
from flora.algebra.places import tensor_name
from flora.algebra.recombine import Recombined, measure_again, recombine
from flora.checkpoint import Checkpoint
from flora.extract.workers import choose_crew, in_order
from flora.forms import EXPERT_KINDS
from flora.identity import BaseRecord
from flora.lowrank import trim
from flora.prune import prune
from flora.rank import RankRule


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """The adapter made, and how far each module is from what was asked."""

    adapter: Adapter
    modules: Mapping[str, Recombined]
    notes: tuple[str, ...]  # what could not be merged as the weights say

    @property
    def distance(self) -> float:
        """‖Σ weight * delta - stored‖ over ‖Σ weight * delta‖, all modules together."""
        total = sum(one.sum_norm_squared for one in self.modules.values())
        return (sum(one.distance_squared for one in self.modules.values()) / total) ** 0.5 if total else 0.0


def merge_adapters(
    parts: Sequence[Part],
    base: Checkpoint,
    record: BaseRecord,
    combination: Combination,
    rule: RankRule,
    progress: Callable[[str, float], None] | None = None,
) -> Merged:
    """One adapter that does what `combination` makes of the parts; the rule cuts it as pruning does.

    Its report measures each module against the method's own result: kept energy is what the stored factors keep of it.
    progress  told each module's name as it is done, and the share of modules done
    Raises BaseMismatch, UsageError (ranks that linear cannot add, a rule that leaves nothing), Unsupported.
    """
    check_parts(parts, record, base)
    modules, terms = modules_of(parts), terms_of(parts)

    def work(name: str) -> Recombined:
        cap = _cap(terms[name], modules[name], combination, rule)
        return recombine(terms[name], combination, name, cap, _widest(terms[name]))

    found: dict[str, Recombined] = {}
    crew = choose_crew(max((_working_bytes(one, len(parts)) for one in modules.values()), default=1), fewest=1)
    for name, made in zip(modules, in_order(crew, work, modules), strict=True):
        found[name] = made
        if progress:
            progress(name, len(found) / len(modules))
    exact = merge_exact(parts, base)
    extras, notes = merge_extras(parts)
    hashes = record.hashes()
    touched = sorted({tensor_name(module, base.tensors) for module in modules.values()} | exact.keys())
    adapter = make_adapter(
        {name: one.factors for name, one in found.items()},
        BaseBinding(
            name=base.name,
            base_id=str(record.base_id),
            architecture=base.architecture,
            touched={name: hashes[name] for name in touched},
        ),
        _recipe(parts, combination, rule),
        _report(found, modules, exact, base),
        extras,
        forms={name: module.form for name, module in modules.items()},
        exact=exact,
    )
    cut = _cut(adapter, rule)
    if cut is not adapter:
        reports = cut.report.by_name() if cut.report else {}
        for name, module in modules.items():
            left = cut.factors.get(name, trim(found[name].factors, 0))
            change = reports[_line(module, base)[0]]
            found[name] = measure_again(found[name], left, terms[name], combination, change.kept)
        cut = replace(cut, report=_report(found, modules, exact, base))
    return Merged(cut, found, tuple(notes))


def _working_bytes(module: Module, num_parts: int) -> int:
    """What one worker holds at most: a float32 matrix of each part, and the result and what factorizing it takes."""
    return 4 * (num_parts + 3) * module.out_features * module.in_features


def _cap(terms: Sequence[Term], module: Module, combination: Combination, rule: RankRule) -> int:
    """The most terms a module can get. The sum's rank, which is no bound for TIES and DARE, stands in for one there."""
    ranks = sum(term.factors.rank for term in terms)
    asked = rule.max_rank if rule.max_rank is not None and not combination.is_low_rank else ranks
    return min(asked, module.in_features, module.out_features)


def _widest(terms: Sequence[Term]) -> torch.dtype:
    """The dtype of the result: that of all factors if they agree, else one that holds any; bf16 for fp8."""
    dtypes = {term.factors.A.dtype for term in terms}
    if len(dtypes) == 1 and (only := next(iter(dtypes))) in (torch.float32, torch.float16):
        return only
    return torch.float32 if torch.float32 in dtypes else torch.bfloat16


def _cut(adapter: Adapter, rule: RankRule) -> Adapter:
    """The adapter cut to the rule, if there is one and it cuts anything; the lineage stays the merge's."""
    cut = None if rule.is_empty else prune(adapter, rule, None)
    if cut is None:
        return adapter
    return replace(cut, header=msgspec.structs.replace(cut.header, recipe=adapter.header.recipe))


def _report(
    found: Mapping[str, Recombined], modules: Mapping[str, Module], exact: Mapping[str, Tensor], base: Checkpoint
) -> ChangeReport:
    tensors = []
    for name, one in found.items():
        line, shape = _line(modules[name], base)
        kept = one.norm_squared - one.residual_squared
        tensors.append(
            TensorChange(
                name=line,
                shape=shape,
                status="extracted",
                norm_squared=one.norm_squared,
                kept=kept,
                rank=one.factors.rank,
            )
        )
    for name, whole in exact.items():
        norm = float((whole.double() - base.load(name).double()).square().sum())
        tensors.append(TensorChange(name=name, shape=tuple(whole.shape), status="exact", norm_squared=norm, kept=norm))
    return ChangeReport(tensors=tuple(sorted(tensors, key=lambda tensor: tensor.name)))


def _line(module: Module, base: Checkpoint) -> tuple[str, tuple[int, ...]]:
    """Name and shape under which a report knows the module: its tensor's, or an expert's own."""
    info = base.tensors[tensor_name(module, base.tensors)]
    if module.kind in EXPERT_KINDS:
        return f"{module.name}.weight", (module.out_features, module.in_features)
    return info.name, info.shape


def _recipe(parts: Sequence[Part], combination: Combination, rule: RankRule) -> Recipe:
    options: dict[str, str | int | float | bool | None] = {"weights": ",".join(f"{part.weight:g}" for part in parts)}
    if not combination.is_low_rank:
        options |= {"density": combination.density, "seed": combination.seed}
    asked = {"rank": rule.max_rank, "energy": rule.energy, "budget_bytes": rule.budget_bytes}
    return Recipe(
        operation="merge",
        method=combination.method,
        options=options | {name: value for name, value in asked.items() if value is not None},
        parents=tuple(part.digest for part in parts if part.digest),
    )
