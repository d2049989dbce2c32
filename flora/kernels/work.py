"""The step's work list: which rows of the batch meet which adapter."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

SEGMENT_ROWS = 8  # as many as a tensor core takes at once as its columns; a row's bits are the same in any segment
RANK_BLOCK = 16  # ranks that a program of shrink computes at once
RANK_LANES = 8  # at most so many of a segment's programs, by rank block; a higher rank gives each several

Segment = tuple[int, int, int]  # an adapter's slot, the first row, how many rows
Share = tuple[int, int, int, int]  # of a segment: which lane of its ranks, 0 to RANK_LANES - 1, comes last


@dataclass(frozen=True, slots=True, eq=False)
class WorkList:
    """Segments of consecutive rows that share an adapter. Base rows are in no segment and are never touched.

    Only the tensors' values change from step to step, so a captured CUDA graph replays over any other list of the same
    capacity.
    """

    segments: Tensor  # int32 [capacity, 3]: slot, first_row, num_rows <= block_rows; or [capacity, 4], Shares of them
    num_segments: Tensor  # int32 [1]: of these rows are in use, and the others unread
    block_rows: int  # on a GPU SEGMENT_ROWS suit decode, 64 prefill; the CPU path takes any
    max_rank: int  # no module of a resident adapter has a higher rank; sizes buffers, changes no result

    @property
    def is_shared(self) -> bool:
        """Whether a segment's ranks are shared among several rows of the list."""
        return self.segments.shape[1] == 4

    @property
    def room(self) -> int:
        """Segments that it can hold."""
        return len(self.segments) // (RANK_LANES if self.is_shared else 1)

    @classmethod
    def build(
        cls,
        segments: Sequence[Segment] | Sequence[Share],
        *,
        block_rows: int,
        max_rank: int,
        capacity: int | None = None,
        shared: bool = False,
        device: torch.device | str = "cpu",
    ) -> "WorkList":
        """A new work list that holds `segments`, with room for `capacity` of them (default: exactly these).

        shared  they are Shares
        """
        capacity = len(segments) if capacity is None else capacity
        if len(segments) > capacity:
            raise ValueError(f"{len(segments)} segments do not fit a work list of capacity {capacity}")
        table = torch.zeros(capacity, 4 if shared else 3, dtype=torch.int32)
        if segments:
            table[: len(segments)] = torch.tensor(segments, dtype=torch.int32)
        count = torch.tensor([len(segments)], dtype=torch.int32)
        return cls(table.to(device), count.to(device), block_rows, max_rank)


@dataclass(frozen=True, slots=True, eq=False)
class LoraWork:
    """Rows that have an adapter, listed for each of the two kernels: the same rows in both lists."""

    shrink: WorkList  # on a GPU of Shares, but for prompts' own list
    expand: WorkList


def cut_runs(runs: Iterable[Segment], rows: int, ranks: Sequence[int]) -> list[Segment]:
    """Segments of at most so many rows, by the falling rank of their slot: a GPU starts the short ones last."""
    return [
        (slot, row, min(rows, start + count - row))
        for slot, start, count in sorted(runs, key=lambda run: -ranks[run[0]])
        for row in range(start, start + count, rows)
    ]


def share_ranks(segments: Iterable[Segment], ranks: Sequence[int]) -> list[Share]:
    """Each segment once for each lane that has a block of its slot's rank: no program is started to find none."""
    return [
        (slot, row, count, lane)
        for slot, row, count in segments
        for lane in range(min(RANK_LANES, -(-ranks[slot] // RANK_BLOCK)))
    ]


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
