"""The whole road from two checkpoints to an adapter; what happens to one pair of tensors stands in `change.py`."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

import torch

from flora.adapter import Adapter, BaseBinding, Recipe, make_adapter
from flora.checkpoint import Checkpoint
from flora.extract.change import Change, PairWorker
from flora.extract.config import ExtractConfig
from flora.extract.plan import ExtractionPlan, plan_extraction
from flora.extract.report import check_report, make_report
from flora.extract.sidecars import changed_extras
from flora.extract.workers import in_order
from flora.forms import Form
from flora.identity import BaseRecord, base_record
from flora.rank import ranks_for_budget

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExtractProgress:
    """Told after each tensor, in the order of names."""

    name: str  # of the tensor just done
    done_bytes: int  # of both checkpoints
    total_bytes: int
    done_modules: int
    total_modules: int


@dataclass(frozen=True, slots=True, eq=False)
class ExtractResult:
    adapter: Adapter
    base_record: BaseRecord
    tuned_record: BaseRecord
    plan: ExtractionPlan
    timings: Mapping[str, float]  # seconds: `total` by the clock; delta, factorize, fit summed over the workers


def extract(
    base: Checkpoint,
    tuned: Checkpoint,
    config: ExtractConfig,
    progress: Callable[[ExtractProgress], None] | None = None,
) -> ExtractResult:
    """The adapter that turns `base` into `tuned`, as nearly as the rule allows. Reads both once and writes nothing.

    Raises what `plan_extraction` does, NotFinite, CheckpointError (nothing to extract has changed), and with
    `config.strict` CheckFailed when a module keeps less than the asked energy.
    """
    start = time.perf_counter()
    plan = plan_extraction(base, tuned, config)
    for note in plan.notes:
        log.info("%s", note)
    with _hashing(base, tuned, config.cache_dir) as records, _full_float32():
        changes = list(_work_through(base, tuned, plan, config, progress))
        base_is, tuned_is = records()
    changes, cut = _cut_to_budget(changes, config)
    report = make_report(changes, cut, plan.ranks, config)
    check_report(report, base, tuned, config)
    adapter = make_adapter(
        {change.pair.module: change.fit.factors for change in changes if change.fit},
        base=_bind(base, base_is, changes),
        recipe=_recipe(config, base, tuned, tuned_is),
        report=report,
        extras=changed_extras(base, tuned),
        forms=_forms(changes),
        exact={change.pair.name: change.whole for change in changes if change.whole is not None},
    )
    return ExtractResult(adapter, base_is, tuned_is, plan, _timings(changes, time.perf_counter() - start))


@contextmanager
def _hashing(
    base: Checkpoint, tuned: Checkpoint, cache_dir: Path | None
) -> Iterator[Callable[[], tuple[BaseRecord, BaseRecord]]]:
    """Both records, made in a thread while the matrices are worked on; an error outside stops it at the next file."""
    stop = Event()

    def check(_: int) -> None:
        if stop.is_set():
            raise CancelledError

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(lambda: (base_record(base, cache_dir, check), base_record(tuned, cache_dir, check)))
        try:
            yield future.result
        finally:
            stop.set()


@contextmanager
def _full_float32() -> Iterator[None]:
    """float32 products in float32, whatever faster formats (TF32, bf16) this process otherwise allows for them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _work_through(
    base: Checkpoint,
    tuned: Checkpoint,
    plan: ExtractionPlan,
    config: ExtractConfig,
    progress: Callable[[ExtractProgress], None] | None,
) -> Iterator[Change]:
    done_bytes = done_modules = 0
    total_modules = len(plan.extractable)
    for change in in_order(plan.crew, PairWorker(base, tuned, plan.ranks, config), plan.pairs):
        done_bytes += change.pair.num_bytes
        done_modules += change.pair.status == "extractable"
        if progress:
            progress(ExtractProgress(change.pair.name, done_bytes, plan.read_bytes, done_modules, total_modules))
        yield change


def _cut_to_budget(changes: list[Change], config: ExtractConfig) -> tuple[list[Change], set[str]]:
    """All modules' terms cut once to the budget, if there is one; and the names of the modules that lost terms."""
    fits = {change.pair.module: change.fit for change in changes if change.fit}
    if config.rule.budget_bytes is None or not fits:
        return changes, set()
    ranks = ranks_for_budget(
        {change.pair.module: change.energies for change in changes if change.energies is not None},
        {module: fit.factors.bytes_per_rank for module, fit in fits.items()},
        config.rule.budget_bytes,
    )
    cut = {module for module, fit in fits.items() if ranks[module] < fit.factors.rank}
    return [
        replace(change, fit=change.fit.trim(ranks[change.pair.module])) if change.fit else change for change in changes
    ], cut


def _forms(changes: Sequence[Change]) -> dict[str, Form]:
    """What each module is. A head that turned out to be its embedding again, stored twice, is tied to it."""
    tied = [change.pair for change in changes if change.tied]
    copies = {pair.twin[0].name: pair.module for pair in tied if pair.twin is not None}
    forms = {}
    for change in changes:
        pair = change.pair
        if pair.kind == "embedding" and pair.base and pair.base.name in copies:
            pair = replace(pair, tied=(*pair.tied, copies[pair.base.name]))
        forms[pair.module] = pair.form
    return forms


def _bind(base: Checkpoint, record: BaseRecord, changes: Sequence[Change]) -> BaseBinding:
    hashes = record.hashes()
    touched = [
        change.pair.base.name
        for change in changes
        if change.pair.base and (change.whole is not None or (change.fit and change.fit.factors.rank))
    ]
    return BaseBinding(
        name=base.name,
        base_id=str(record.base_id),
        architecture=base.architecture,
        touched={name: hashes[name] for name in touched},
    )


def _recipe(config: ExtractConfig, base: Checkpoint, tuned: Checkpoint, record: BaseRecord) -> Recipe:
    """Everything but the device and the strictness, which do not say what is made."""
    return Recipe(
        operation="extract",
        method="svd" if config.exact else "gram or block Krylov",
        options={
            "rank": config.rule.max_rank,
            "energy": config.rule.energy,
            "budget_bytes": config.rule.budget_bytes,
            "factor_dtype": config.factor_dtype,
            "include": ",".join(config.include) or None,
            "exclude": ",".join(config.exclude) or None,
            "seed": config.seed,
            **({"embeddings": True} if config.wish.embeddings else {}),
            **({"vectors": True} if config.wish.vectors else {}),
        },
        # a trainer often leaves the base's own Hub id in the config of what it saves
        tuned_name=tuned.name if tuned.name != base.name else tuned.path.name,
        tuned_id=str(record.base_id),
    )


def _timings(changes: Sequence[Change], total: float) -> dict[str, float]:
    timings = {"total": total}
    for change in changes:
        for stage, seconds in change.seconds.items():
            timings[stage] = timings.get(stage, 0.0) + seconds
    return timings
