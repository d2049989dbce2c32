"""A planned step's arrays, filled by numpy: each row's token, lane, position and KV slot, and the work lists."""

from collections.abc import Callable, Sequence

import numpy as np

from flora.kernels import SEGMENT_ROWS, Segment, Share, cut_runs, share_ranks
from flora.serve.engine.batch import JOINT_ROWS, PREFILL_BLOCK_ROWS
from flora.serve.engine.cuda.inputs import Arrays, StepInputs
from flora.serve.engine.cuda.lanes import Lanes
from flora.serve.engine.schedule.scheduler import Chunk


class StepFiller:
    """Fills a step's inputs.

    Rows of a step: sequences that decode, by adapter, then those that prefill, by adapter. In steps of many rows each
    part has work lists of its own, since a tile of many rows is wasted on one and the other way round.
    """

    def __init__(
        self,
        inputs: StepInputs,
        lanes: Lanes,
        page_tokens: int,
        slot_ranks: Callable[[], Sequence[int]],
        *,
        one_list: bool = False,
    ) -> None:
        """slot_ranks  the highest rank of each slot's adapter
        one_list    rows that decode go the way of those that prefill: a row's bits then do not depend on which it is
        """
        self.inputs = inputs
        self.lanes = lanes
        self._page_tokens = page_tokens
        self._slot_ranks = slot_ranks
        self._one_list = one_list

    def order(self, chunks: Sequence[Chunk], slots: Sequence[int | None]) -> list[int]:
        """Indices of the chunks in the order of their rows."""
        keys = [
            (chunk.count > 1 and not self._one_list, -1 if slot is None else slot)
            for chunk, slot in zip(chunks, slots, strict=True)
        ]
        return sorted(range(len(chunks)), key=keys.__getitem__)

    def fill(self, chunks: Sequence[Chunk], counts: np.ndarray, slots: np.ndarray, padded_rows: int) -> None:
        """Writes and sends the arrays of a step.

        chunks  in the order of their rows, see order
        counts  int64 [len(chunks)]: rows of each;  slots  int32 [len(chunks)]: of its adapter, -1 for the base
        """
        num_sequences = len(chunks)
        ends = counts.cumsum()
        rows = int(ends[-1])
        lanes = self.lanes.of([chunk.sequence for chunk in chunks])
        starts = np.fromiter((chunk.start for chunk in chunks), np.int64, num_sequences)
        samples = np.fromiter((chunk.samples for chunk in chunks), bool, num_sequences)
        host = self.inputs.begin()
        has_adapter = slots >= 0
        if rows == num_sequences:
            row_lanes, positions, row_adapters = lanes, starts, has_adapter
            host["token_ids"][:rows] = [chunk.sequence.tokens[chunk.start] for chunk in chunks]
        else:
            owners = np.repeat(np.arange(num_sequences), counts)
            row_lanes, positions = lanes[owners], np.arange(rows) - (ends - counts - starts)[owners]
            row_adapters = has_adapter[owners]
            tokens: list[int] = []
            for chunk in chunks:
                tokens += chunk.sequence.tokens[chunk.start : chunk.start + chunk.count]
            host["token_ids"][:rows] = tokens
        tables, page_tokens = self.lanes.tables, self._page_tokens
        pages = tables[row_lanes, positions // page_tokens].astype(np.int64)
        host["lanes"][:rows] = row_lanes
        host["positions"][:rows] = positions
        host["slots"][:rows] = pages * page_tokens + positions % page_tokens
        host["adapter_rows"][:rows] = row_adapters
        host["seq_lens"][:num_sequences] = starts + counts
        host["query_starts"][1 : num_sequences + 1] = ends
        host["block_tables"][:num_sequences] = tables[lanes]
        num_sampled = int(samples.sum())
        host["logits_rows"][:num_sampled] = ends[samples] - 1
        host["sampled_lanes"][:num_sampled] = lanes[samples]
        num_decoding = 0 if self._one_list else int((counts == 1).sum())
        host["prefill_range"][:] = num_decoding, num_sequences
        first_rows = ends - counts
        decoding = self._runs(slots[:num_decoding], first_rows[:num_decoding], num_decoding)
        prompts = self._runs(slots[num_decoding:], first_rows[num_decoding:], rows)
        self._fill_lists(host, decoding, prompts, joint=padded_rows <= JOINT_ROWS and not self._one_list)
        self._pad(host, rows, padded_rows, num_sequences, num_sampled)
        self.inputs.send()

    def _runs(self, slots: np.ndarray, first_rows: np.ndarray, end_row: int) -> list[Segment]:
        """Rows with one adapter. slots, first_rows: of sequences in order of their rows."""
        edges = np.flatnonzero(np.diff(slots, prepend=-1))  # base rows, slot -1, come first and start no run
        starts = first_rows[edges].tolist()
        ends = [*starts[1:], end_row]
        return [
            (slot, start, end - start) for slot, start, end in zip(slots[edges].tolist(), starts, ends, strict=False)
        ]

    def _fill_lists(self, host: Arrays, decoding: list[Segment], prompts: list[Segment], *, joint: bool) -> None:
        """The work lists, of which a step's kind says who reads them.

        joint  prompts are in the lists of rows that decode
        """
        joined, apart = ([*decoding, *prompts], []) if joint else (decoding, prompts)
        ranks = self._slot_ranks()
        segments = cut_runs(joined, SEGMENT_ROWS, ranks)
        _write(host, "shrink_segments", share_ranks(segments, ranks))
        _write(host, "expand_segments", segments)
        _write(host, "prefill_segments", cut_runs(apart, PREFILL_BLOCK_ROWS, ranks))

    def fill_nothing(self) -> None:
        """Sends the largest step that computes nothing: what graphs are captured with."""
        host = self.inputs.begin()
        self._pad(host, 0, self.inputs.sizes.rows, 0, 0)
        for name in ("shrink", "expand", "prefill"):
            host[f"num_{name}_segments"][:] = 0
        host["prefill_range"][:] = 0
        self.inputs.send()

    def _pad(self, host: Arrays, row: int, end_row: int, sequence: int, num_sampled: int) -> None:
        """Rows and sequences that compute nothing anyone reads: no context, no adapter, no place in the KV."""
        end_sequence = self.inputs.sizes.sequences
        host["token_ids"][row:end_row] = 0
        host["lanes"][row:end_row] = self.lanes.spare
        host["positions"][row:end_row] = 0
        host["slots"][row:end_row] = -1
        host["adapter_rows"][row:end_row] = 0
        host["seq_lens"][sequence:end_sequence] = 0
        host["logits_rows"][num_sampled:end_sequence] = 0
        host["sampled_lanes"][num_sampled:end_sequence] = self.lanes.spare
        host["query_starts"][sequence + 1 : end_sequence + 1] = row


def _write(host: Arrays, name: str, segments: Sequence[Segment] | Sequence[Share]) -> None:
    if segments:
        host[name][: len(segments)] = segments
    host[f"num_{name}"][:] = len(segments)
