"""The step's work list: which rows of the batch meet which adapter."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from flora.kernels.tuning import LoraTuning

SHRINK_ROWS = 16  # of a segment that shrink takes by one tile; a row's bits are the same in any of up to so many
FEW_ROWS = 4  # of a segment that expand takes row by row; likewise
_PAIRED_ROWS = 6  # with one adapter, up to which two a segment are faster than four (benchmarks/NOTES.md)
_SMALL_RANK = LoraTuning().expand_small_rank  # up to which they are not

Segment = tuple[int, int, int]  # an adapter's slot, the first row, how many rows


@dataclass(frozen=True, slots=True, eq=False)
class WorkList:
    """Segments of consecutive rows that share an adapter. Base rows are in no segment and are never touched.

    Only the tensors' values change from step to step, so a captured CUDA graph replays over any other list of the same
    capacity.
    """

    segments: Tensor  # int32 [capacity, 3]: slot, first_row, num_rows <= block_rows; unread past num_segments
    num_segments: Tensor  # int32 [1]
    block_rows: int  # on a GPU FEW_ROWS suits decode and 64 prefill; the CPU path takes any
    max_rank: int  # no module of a resident adapter has a higher rank; sizes buffers, changes no result
    # int32 [1]: so many segments, the first, are prompts' and have up to block_rows; the others, of rows that decode,
    # up to FEW_ROWS. Expand's way hangs on this, never on how many rows a segment has. None: all are of one kind.
    num_wide: Tensor | None = None

    @classmethod
    def build(
        cls,
        segments: Sequence[Segment],
        *,
        block_rows: int,
        max_rank: int,
        capacity: int | None = None,
        num_wide: int | None = None,
        device: torch.device | str = "cpu",
    ) -> "WorkList":
        """A new work list that holds `segments`, with room for `capacity` of them (default: exactly these)."""
        capacity = len(segments) if capacity is None else capacity
        if len(segments) > capacity:
            raise ValueError(f"{len(segments)} segments do not fit a work list of capacity {capacity}")
        table = torch.zeros(capacity, 3, dtype=torch.int32)
        if segments:
            table[: len(segments)] = torch.tensor(segments, dtype=torch.int32)
        count = torch.tensor([len(segments)], dtype=torch.int32)
        wide = None if num_wide is None else torch.tensor([num_wide], dtype=torch.int32, device=device)
        return cls(table.to(device), count.to(device), block_rows, max_rank, wide)


@dataclass(frozen=True, slots=True, eq=False)
class LoraWork:
    """Rows that have an adapter, cut for each of the two kernels: the same rows in both lists.

    Shrink multiplies 16 rows as fast as one. Expand goes row by row where rows decode.
    """

    shrink: WorkList
    expand: WorkList


def few_rows(num_rows: int, rank: int) -> int:
    """Rows a segment, up to FEW_ROWS, for so many rows of a decode step that share an adapter of this rank."""
    return 2 if num_rows <= _PAIRED_ROWS and rank > _SMALL_RANK else FEW_ROWS


def cut_runs(runs: Iterable[Segment], rows: int, ranks: Sequence[int]) -> list[Segment]:
    """Segments of at most so many rows, by the falling rank of their slot."""
    return [
        (slot, row, min(rows, start + count - row))
        for slot, start, count in sorted(runs, key=lambda run: -ranks[run[0]])
        for row in range(start, start + count, rows)
    ]


def cut_step(
    decoding: Sequence[Segment], prompts: Sequence[Segment], ranks: Sequence[int]
) -> tuple[list[Segment], list[Segment], int]:
    """Segments for shrink and for expand of rows that decode and prompts in one list, and expand's `num_wide`.

    decoding, prompts  runs of rows that share an adapter
    ranks              of each slot
    """
    few = [
        (slot, row, min(each, start + count - row))
        for slot, start, count in decoding
        for each in (few_rows(count, ranks[slot]),)
        for row in range(start, start + count, each)
    ]
    shrink, wide = cut_runs((*decoding, *prompts), SHRINK_ROWS, ranks), cut_runs(prompts, SHRINK_ROWS, ranks)
    return shrink, [*wide, *heaviest_first(few, ranks)], len(wide)


def heaviest_first(segments: Iterable[Segment], ranks: Sequence[int]) -> list[Segment]:
    """The segments by falling rank of their slot, of one rank those of more rows first, so that the last programs that
    a GPU starts are short ones.
    """
    return sorted(segments, key=lambda segment: (-ranks[segment[0]], -segment[2]))


def split_segments(row_slots: Iterable[int | None], block_rows: int) -> list[Segment]:
    """(slot, first_row, num_rows) for every run of rows with one slot, cut so that num_rows <= block_rows.

    row_slots  each row's adapter slot in batch order; None is a base row, which is in no segment.
    """
    segments: list[Segment] = []
    first = 0
    for slot, run in groupby(row_slots):
        end = first + sum(1 for _ in run)
        if slot is not None:
            segments += [(slot, row, min(block_rows, end - row)) for row in range(first, end, block_rows)]
        first = end
    return segments
