"""A step's arrays: every row's token, position and KV slot, and which rows meet which adapter."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flora.kernels import ALL_GROUPS, MIN_ROWS, Context, Group, LoraWork, WorkList, split_segments
from flora.serve.engine.schedule.pages import NULL_PAGE
from flora.serve.engine.schedule.scheduler import Chunk

DECODE_BLOCK_ROWS = 16
PREFILL_BLOCK_ROWS = 64
# Of a GPU's step, up to which prompts are in the lists of rows that decode, by segments of few rows: the weights that
# they read once more cost less than two launches and a second stream (benchmarks/NOTES.md, of an H100).
JOINT_ROWS = 512


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows of base sequences first, then those of each adapter together. S sequences, n rows, m of them sampled.

    Rows past those of the sequences compute nothing that anyone reads.
    """

    chunks: tuple[Chunk, ...]  # in the order of their rows
    token_ids: Tensor  # int64 [n]
    positions: Tensor  # int64 [n]
    slots: Tensor  # int64 [n]: page * page_tokens + offset
    context: Context  # of the S sequences
    logits_rows: Tensor  # int64 [m]
    work: tuple[LoraWork, ...]  # none if no row has an adapter
    groups: frozenset[Group] = ALL_GROUPS  # that any of its adapters may touch
    adapter_rows: Tensor | None = (
        None  # int32 [n], not 0: has an adapter; low-rank terms run beside the base's products
    )

    @property
    def sampled(self) -> list[Chunk]:
        """The chunks whose last rows are logits_rows."""
        return [chunk for chunk in self.chunks if chunk.samples]


def build_batch(
    chunks: Sequence[Chunk],
    adapter_slots: Sequence[int | None],
    page_tokens: int,
    max_rank: int,
    device: torch.device,
) -> Batch:
    """The arrays of one planned step.

    adapter_slots  of each chunk: its adapter's row in the kernels' tables, None for the base
    max_rank       of the resident adapters' modules

    There are at least as many rows as a product on a CPU needs, so that none of a layer's four has to be padded.
    """
    order = sorted(range(len(chunks)), key=lambda i: -1 if (slot := adapter_slots[i]) is None else slot)
    chunks = tuple(chunks[i] for i in order)
    slots = [adapter_slots[i] for i in order]

    counts = np.array([chunk.count for chunk in chunks])
    starts = np.concatenate(([0], counts.cumsum()))
    table = np.full((len(chunks), max(len(chunk.sequence.pages) for chunk in chunks)), NULL_PAGE, dtype=np.int32)
    token_ids: list[int] = []
    for row, chunk in enumerate(chunks):
        table[row, : len(chunk.sequence.pages)] = chunk.sequence.pages
        token_ids += chunk.sequence.tokens[chunk.start : chunk.start + chunk.count]
    first_positions = np.array([chunk.start for chunk in chunks])
    owners = np.repeat(np.arange(len(chunks)), counts)  # each row's sequence
    positions = np.arange(starts[-1]) - (starts[:-1] - first_positions)[owners]
    kv_slots = table[owners, positions // page_tokens].astype(np.int64) * page_tokens + positions % page_tokens
    spare = max(0, MIN_ROWS - int(starts[-1]))
    token_ids += [0] * spare
    positions = np.pad(positions, (0, spare))
    kv_slots = np.pad(kv_slots, (0, spare), constant_values=-1)
    logits_rows = [end - 1 for end, chunk in zip(starts[1:], chunks, strict=True) if chunk.samples]

    max_queries = int(counts.max())
    return Batch(
        chunks=chunks,
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.from_numpy(positions).to(device),
        slots=torch.from_numpy(kv_slots).to(device),
        context=Context(
            block_tables=torch.from_numpy(table).to(device),
            seq_lens=torch.from_numpy((first_positions + counts).astype(np.int32)).to(device),
            query_starts=torch.from_numpy(starts.astype(np.int32)).to(device),
            max_queries=max_queries,
        ),
        logits_rows=torch.tensor(logits_rows, dtype=torch.int64, device=device),
        work=_work_lists(slots, counts, max_queries, max_rank, device),
    )


def _work_lists(
    slots: Sequence[int | None], counts: np.ndarray, max_queries: int, max_rank: int, device: torch.device
) -> tuple[LoraWork, ...]:
    if all(slot is None for slot in slots):
        return ()
    row_slots = [slot for slot, count in zip(slots, counts.tolist(), strict=True) for _ in range(count)]
    block_rows = DECODE_BLOCK_ROWS if max_queries == 1 else PREFILL_BLOCK_ROWS
    segments = split_segments(row_slots, block_rows)
    work = WorkList.build(segments, block_rows=block_rows, max_rank=max_rank, device=device)
    return (LoraWork(work, work),)
