"""The whole road from two checkpoints to an adapter; what happens to one pair of tensors stands in `change.py`."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch

from flora.adapter import Adapter, BaseBinding, Recipe, make_adapter
from flora.checkpoint import Checkpoint
from flora.errors import CheckFailed, FloraError
from flora.extract.change import Change
from flora.extract.config import ExtractConfig
from flora.extract.experts import readable, stored_names
from flora.extract.jobs import ExtractProgress, Job, work_through
from flora.extract.journal import Journal
from flora.extract.plan import ExtractionPlan, plan_extraction
from flora.extract.report import check_report, make_report
from flora.extract.sidecars import changed_extras
from flora.extract.stopwatch import STAGES, Stopwatch
from flora.forms import Form
from flora.identity import BaseRecord, records_beside
from flora.rank import ranks_for_budget


@dataclass(frozen=True, slots=True, eq=False)
class ExtractResult:
    adapter: Adapter
    base_record: BaseRecord
    tuned_record: BaseRecord
    plan: ExtractionPlan
    timings: Mapping[str, float]  # seconds: `total` and its steps by the clock, STAGES summed over the workers
    peak_device_bytes: int | None = None  # of a GPU's memory, that this process held; None on the CPU
    journal: Journal | None = None  # to be discarded once the adapter is stored


def extract(
    base: Checkpoint,
    tuned: Checkpoint,
    config: ExtractConfig,
    progress: Callable[[ExtractProgress], None] | None = None,
    records: Callable[[], Sequence[BaseRecord]] | None = None,
) -> ExtractResult:
    """The adapter that turns `base` into `tuned`, as nearly as the rule allows. Reads both once.

    Writes nothing but file hashes and the journal, where the configuration has folders for them.
    Raises what `plan_extraction` does, NotFinite, CheckpointError (nothing to extract has changed), and with
    `config.strict` CheckFailed when a module keeps less than the asked energy.
    """
    (found,) = extract_many(base, [tuned], config, progress, records)
    if isinstance(found, FloraError):
        raise found
    return found


def extract_many(
    base: Checkpoint,
    tuned: Sequence[Checkpoint],
    config: ExtractConfig,
    progress: Callable[[ExtractProgress], None] | None = None,
    records: Callable[[], Sequence[BaseRecord]] | None = None,
) -> list[ExtractResult | FloraError]:
    """One adapter for each tuned checkpoint, in their order; each tensor of the base is at hand for all in turn.

    What is wrong with one checkpoint's weights stands in its place and stops no other. Raises what `plan_extraction`
    does for any of them, before any weight is read.

    records  of the base and of each tuned checkpoint, where somebody makes them already: see identity.records_beside
    """
    clock = Stopwatch(torch.device("cpu"))
    with clock.by_clock("plan"):
        plans = [plan_extraction(base, one, config) for one in tuned]
        jobs = [Job(base, one, plan, config) for one, plan in zip(tuned, plans, strict=True)]
    beside = nullcontext(records) if records else records_beside([base, *tuned], config.cache_dir)
    with beside as records, _full_float32():
        with clock.by_clock("work"):
            found = work_through(jobs, progress)
        if all(isinstance(one, FloraError) for one in found):
            return [one for one in found if isinstance(one, FloraError)]
        with clock.by_clock("hashes"):
            base_is, *tuned_are = records()
    steps = clock.take()
    return [
        changes if isinstance(changes, FloraError) else _finish(job, changes, base_is, tuned_is, config, steps)
        for job, changes, tuned_is in zip(jobs, found, tuned_are, strict=True)
    ]


def _finish(
    job: Job,
    changes: list[Change],
    base_is: BaseRecord,
    tuned_is: BaseRecord,
    config: ExtractConfig,
    steps: Mapping[str, float],
) -> ExtractResult | FloraError:
    """Everything that takes the whole of one checkpoint's changes: the budget, the report, the adapter.

    steps  seconds of what came before, by the clock
    """
    start = time.perf_counter()
    changes, cut = _cut_to_budget(changes, config)
    report = make_report(changes, cut, job.plan.ranks, config)
    try:
        check_report(report, job.base, job.tuned, config)
    except FloraError as error:
        if job.journal is not None:
            leave = job.journal.release if isinstance(error, CheckFailed) else job.journal.discard
            leave()  # a check that failed may pass on the same work, once less is asked
        return error
    adapter = make_adapter(
        {change.pair.module: change.fit.factors for change in changes if change.fit},
        base=_bind(job.base, base_is, changes),
        recipe=_recipe(config, job.base, job.tuned, tuned_is),
        report=report,
        extras=changed_extras(job.base, job.tuned),
        forms=_forms(changes),
        exact={change.pair.name: change.whole for change in changes if change.whole is not None},
        first_rows={change.pair.name: change.pair.shape[0] for change in changes if change.pair.num_new_rows},
    )
    timings = _timings(changes, {**steps, "finish": time.perf_counter() - start})
    return ExtractResult(adapter, base_is, tuned_is, job.plan, timings, _peak_device_bytes(config.device), job.journal)


@contextmanager
def _full_float32() -> Iterator[None]:
    """float32 products in float32, whatever faster formats (TF32, bf16) this process otherwise allows for them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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
    hashes, view = record.hashes(), readable(base)
    touched = dict.fromkeys(
        name
        for change in changes
        if change.pair.base and (change.whole is not None or (change.fit and change.fit.factors.rank))
        for name in stored_names(view, change.pair.base.name)
    )
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
            **({"routers": True} if config.wish.routers else {}),
        },
        # a trainer often leaves the base's own Hub id in the config of what it saves
        tuned_name=tuned.name if tuned.name != base.name else tuned.path.name,
        tuned_id=str(record.base_id),
    )


def _timings(changes: Sequence[Change], steps: Mapping[str, float]) -> dict[str, float]:
    timings = {"total": sum(steps.values()), **steps}
    for stage in STAGES:
        timings[stage] = sum(change.seconds.get(stage, 0.0) for change in changes)
    return timings


def _peak_device_bytes(device: str) -> int | None:
    return torch.cuda.max_memory_reserved(device) if torch.device(device).type == "cuda" else None
