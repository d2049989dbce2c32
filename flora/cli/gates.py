"""What the demo must show, or it has failed: bounds on measured values, and nothing else."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MIN_HIDDEN_SIZE = 256
MAX_RANK_SHARE = 1 / 3  # of the smaller side, in every module
MAX_SIZE_SHARE = 0.40  # of the checkpoint's bytes
MIN_ITEMS = 200
MAX_BASE_ACCURACY = 0.2
MIN_TUNED_ACCURACY = 0.8
MAX_SERVED_LOSS = 0.03


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One task's row of the demo's table. Accuracies are exact match on held-out items."""

    task: str
    num_items: int
    base_accuracy: float  # of the base, through the server
    tuned_accuracy: float  # of the tuned checkpoint's folder
    served_accuracy: float  # of base and adapter, through the server
    max_rank: int
    max_rank_share: float  # rank over min(m, n), the largest of all modules
    kept_share_of_modules: float
    kept_share: float  # of the whole change
    checkpoint_bytes: int  # of the tuned checkpoint's weights
    adapter_bytes: int

    @property
    def size_share(self) -> float:
        return self.adapter_bytes / self.checkpoint_bytes


def broken_gates(hidden_size: int, results: Sequence[TaskResult], tokens_during_load: int) -> list[str]:
    """Every gate that does not hold, in words; none if the demo shows what it says."""
    broken = [] if hidden_size >= MIN_HIDDEN_SIZE else [f"hidden size {hidden_size} is below {MIN_HIDDEN_SIZE}"]
    for result in results:
        broken += [f"{result.task}: {what}" for what in _broken(result)]
    if tokens_during_load == 0:
        broken.append("no other stream got a token while the last adapter was extracted, registered and loaded")
    return broken


def _broken(result: TaskResult) -> Iterator[str]:
    if result.num_items < MIN_ITEMS:
        yield f"{result.num_items} held-out items are fewer than {MIN_ITEMS}"
    if result.max_rank_share > MAX_RANK_SHARE:
        yield f"a rank is {result.max_rank_share:.2f} of its matrix's smaller side, above {MAX_RANK_SHARE:.2f}"
    if result.size_share > MAX_SIZE_SHARE:
        yield f"the adapter has {result.size_share:.2f} of the checkpoint's bytes, above {MAX_SIZE_SHARE:.2f}"
    if result.base_accuracy > MAX_BASE_ACCURACY:
        yield f"the base answers {result.base_accuracy:.3f} already, above {MAX_BASE_ACCURACY}"
    if result.tuned_accuracy < MIN_TUNED_ACCURACY:
        yield f"the tuned checkpoint answers {result.tuned_accuracy:.3f}, below {MIN_TUNED_ACCURACY}"
    if result.served_accuracy < result.tuned_accuracy - MAX_SERVED_LOSS:
        yield (
            f"the served adapter answers {result.served_accuracy:.3f}, more than {MAX_SERVED_LOSS} below the "
            f"checkpoint's {result.tuned_accuracy:.3f}"
        )
