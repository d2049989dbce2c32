"""What an extraction will do, from headers alone: every tensor's fate, the ranks possible, bytes and memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flora.checkpoint import Checkpoint
from flora.errors import UsageError
from flora.extract.config import FACTOR_BYTES, ExtractConfig
from flora.extract.factorize import GRAM_SIDE
from flora.extract.pair import TensorPair
from flora.extract.pairs import pair_tensors
from flora.extract.pieces import RegroupedCheckpoint
from flora.extract.regroup import readable_pair
from flora.extract.sidecars import check_vocabulary
from flora.extract.workers import Crew, choose_crew, choose_gpu_crew
from flora.rank import RankRule

_BUDGET_SPREAD = 4  # under a budget a module may get up to this many times the rank of an even cut
_DELTA_COPIES = 3  # on a GPU, which sums a float32 delta's squares from a float64 copy
_CHUNK_BYTES = 1 << 30  # likewise of a table whose change is only summed
_BUDGET_MIN = 16  # and is offered at least this rank


@dataclass(frozen=True, slots=True)
class ExtractionPlan:
    pairs: tuple[TensorPair, ...]  # every tensor of either checkpoint, by name
    ranks: dict[str, int]  # the most terms that a module (by its tensor's name) can get under the rule
    factor_bytes: int  # of the stored factors, at most
    read_bytes: int  # of both checkpoints
    memory_bytes: int  # estimated peak beside the mapped files
    crew: Crew
    notes: tuple[str, ...] = ()  # what a user should know of how names were matched

    @property
    def extractable(self) -> tuple[TensorPair, ...]:
        return tuple(pair for pair in self.pairs if pair.status == "extractable")


def plan_extraction(base: Checkpoint, tuned: Checkpoint, config: ExtractConfig) -> ExtractionPlan:
    """The plan for this pair. Every error that headers can show is raised here, before any weight is read.

    Raises UsageError, ShapeMismatch, CheckpointError.
    """
    if base.path.resolve() == tuned.path.resolve():
        raise UsageError(f"{base.path} is given as base and as tuned checkpoint", fix="give two different checkpoints")
    _check_device(config.device)
    base, tuned = readable_pair(base, tuned)
    pairs, notes = pair_tensors(base, tuned, config.include, config.exclude, config.wish)
    if isinstance(tuned, RegroupedCheckpoint):
        notes.append(
            "one of the two keeps the experts of a layer in one tensor, the other apart: read as the base's are"
        )
    if not config.wish.embeddings:
        check_vocabulary(base, tuned)
    modules = [pair for pair in pairs if pair.status == "extractable"]
    item_bytes = FACTOR_BYTES[config.factor_dtype]
    ranks = _possible_ranks(modules, config.rule, item_bytes)
    held_bytes = sum(ranks[pair.name] * sum(pair.matrix_shape) * item_bytes for pair in modules)
    worker_bytes = max(_working_bytes(pair.matrix_shape, ranks[pair.name], config) for pair in modules)
    crew = _crew(pairs, worker_bytes, config)
    return ExtractionPlan(
        pairs=tuple(pairs),
        ranks=ranks,
        factor_bytes=min(held_bytes, config.rule.budget_bytes or held_bytes),
        read_bytes=sum(pair.num_bytes for pair in pairs),
        memory_bytes=held_bytes + crew.num_workers * worker_bytes,
        crew=crew,
        notes=tuple(notes),
    )


def _crew(pairs: Sequence[TensorPair], worker_bytes: int, config: ExtractConfig) -> Crew:
    if torch.device(config.device).type != "cuda":
        return choose_crew(worker_bytes, fewest=1 if config.exact else 2)  # a full SVD needs much more memory
    both_sides = max(pair.num_bytes for pair in pairs)
    free_bytes, _ = torch.cuda.mem_get_info(config.device)
    return choose_gpu_crew(both_sides + _DELTA_COPIES * worker_bytes + _CHUNK_BYTES, free_bytes)


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        found = ["cpu", *(f"cuda:{ordinal}" for ordinal in range(torch.cuda.device_count()))]
        raise UsageError(
            f"{name!r} is no device of this machine",
            cause=str(error).partition("\n")[0],
            fix=f"give {' or '.join(found)}",
        ) from error


def _possible_ranks(modules: Sequence[TensorPair], rule: RankRule, item_bytes: int) -> dict[str, int]:
    cap = rule.max_rank or max(min(pair.matrix_shape) for pair in modules)
    if rule.budget_bytes is not None:
        even = rule.budget_bytes // sum(sum(pair.matrix_shape) * item_bytes for pair in modules)
        cap = min(cap, max(_BUDGET_MIN, _BUDGET_SPREAD * even))
    return {pair.name: min(cap, *pair.matrix_shape) for pair in modules}


def _working_bytes(shape: tuple[int, ...], rank: int, config: ExtractConfig) -> int:
    """What one worker holds at its peak: the delta in float32, and what factorizing it takes."""
    small, large = sorted(shape)
    delta = 4 * small * large
    if config.exact:
        return 3 * delta + 8 * small * small  # U and Vh beside it, and LAPACK's own
    basis = 4 * min(3 * rank, small // 2) * (small + large)
    gram = 8 * 4 * min(small, GRAM_SIDE) ** 2
    return delta + max(basis, gram)
