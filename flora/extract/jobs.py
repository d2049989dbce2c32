"""Several tuned checkpoints of one base, worked on side by side: tensor by tensor, each for all of them in turn.

So the base's part of the disk is read once, whatever the number of checkpoints, and is still in the cache for the next.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import local

from flora.checkpoint import Checkpoint
from flora.errors import FloraError
from flora.extract.change import Change, PairWorker
from flora.extract.config import ExtractConfig
from flora.extract.journal import Journal
from flora.extract.pair import TensorPair
from flora.extract.plan import ExtractionPlan
from flora.extract.workers import in_order

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExtractProgress:
    """Told after each tensor, in the order of names."""

    name: str  # of the tensor just done
    done_bytes: int  # of all checkpoints; the base's once for each tuned one
    total_bytes: int
    done_modules: int
    total_modules: int


class Job:
    """One tuned checkpoint's part of the work."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint, plan: ExtractionPlan, config: ExtractConfig) -> None:
        self.base = base
        self.tuned = tuned
        self.plan = plan
        self.config = config
        self.journal = Journal.open(base, tuned, config, plan)
        self.error: FloraError | None = None
        for note in plan.notes:
            log.info("%s", note)

    def worker(self, threads: local) -> Callable[[TensorPair], Change]:
        """What becomes of a pair: as the journal has it, or worked out and recorded there."""
        work, journal = PairWorker(self.base, self.tuned, self.plan.ranks, self.config, threads), self.journal
        if journal is None:
            return work

        def work_once(pair: TensorPair) -> Change:
            known = journal.load(Change(pair))
            if known is None:
                known = work(pair)
                journal.save(known)
            return known

        return work_once


def work_through(
    jobs: Sequence[Job], progress: Callable[[ExtractProgress], None] | None
) -> list[list[Change] | FloraError]:
    """Each job's changes in the order of names, or the first error of its weights, which ends that job alone."""
    threads = local()  # what each works with: jobs take turns on it
    workers = [job.worker(threads) for job in jobs]
    items = sorted((pair.name, i, pair) for i, job in enumerate(jobs) for pair in job.plan.pairs)
    crew = min((job.plan.crew for job in jobs), key=lambda crew: crew.num_workers)
    total_bytes = sum(job.plan.read_bytes for job in jobs)
    total_modules = sum(len(job.plan.extractable) for job in jobs)
    found: list[list[Change]] = [[] for _ in jobs]
    done_bytes = done_modules = 0

    def work(item: tuple[str, int, TensorPair]) -> Change | FloraError | None:
        _, i, pair = item
        if jobs[i].error is not None:
            return None
        try:
            return workers[i](pair)
        except FloraError as error:
            return error

    for (name, i, pair), change in zip(items, in_order(crew, work, items), strict=True):
        if isinstance(change, FloraError):
            jobs[i].error = jobs[i].error or change
            if all(job.error is not None for job in jobs):
                break
        elif change is not None:
            found[i].append(change)
        done_bytes += pair.num_bytes
        done_modules += pair.status == "extractable"
        if progress:
            progress(ExtractProgress(name, done_bytes, total_bytes, done_modules, total_modules))
    for job in jobs:
        if job.error is not None and job.journal is not None:
            job.journal.discard()  # the files must change before another run can go on
    return [job.error or changes for job, changes in zip(jobs, found, strict=True)]
