"""The runner on a GPU: steps overlap, decode replays a graph, and only `collect` waits for the device."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flora.errors import EngineDead
from flora.kernels import AdapterWeights, WorkList
from flora.serve.engine.batch import Batch
from flora.serve.engine.cuda.copies import AdapterCopies
from flora.serve.engine.cuda.graphs import Decoded, DecodeGraphs
from flora.serve.engine.cuda.inputs import InputSizes, StepInputs
from flora.serve.engine.cuda.lanes import Lanes
from flora.serve.engine.cuda.sampler import draw_rows
from flora.serve.engine.model.llama import LlamaModel
from flora.serve.engine.packing import PackedAdapter
from flora.serve.engine.pool import DevicePool
from flora.serve.engine.residency import Resident
from flora.serve.engine.sampler import Draw, Drawn
from flora.serve.engine.scheduler import Chunk, Limits
from flora.serve.engine.sequence import PENDING
from flora.serve.engine.tables import AdapterTables
from flora.serve.messages import TokenLogprobs

_DECODE_BLOCK_ROWS = 16
_PREFILL_BLOCK_ROWS = 64
_GRAPH_MAX_RANK = 512  # of a module in a captured step; it sizes buffers that are written only as far as ranks go


class CudaStep:
    """A launched step: its tokens are on their way to pinned memory."""

    def __init__(
        self, sampled: list[Chunk], tokens: Tensor, highest: Tensor, logprobs: dict[int, tuple[Tensor, Tensor, Tensor]]
    ) -> None:
        """tokens int64, highest float32 [len(sampled)]; logprobs  of a row: chosen [], the top's ids and values [k]"""
        self._sampled = sampled
        self._tokens = _to_host(tokens)
        self._highest = _to_host(highest)
        self._logprobs = {
            row: (_to_host(chosen), _to_host(ids), _to_host(values)) for row, (chosen, ids, values) in logprobs.items()
        }
        self._done = torch.cuda.Event()
        self._done.record()

    def collect(self) -> list[tuple[Chunk, Drawn]]:
        """See LaunchedStep.collect."""
        try:
            self._done.synchronize()
        except torch.AcceleratorError as error:  # a GPU answers nothing after one of these
            raise EngineDead("the GPU failed in a step", cause=str(error)) from error
        tokens, highest = self._tokens.tolist(), self._highest.tolist()
        return [(chunk, self._drawn(row, tokens[row], highest[row])) for row, chunk in enumerate(self._sampled)]

    def _drawn(self, row: int, token: int, highest: float) -> Drawn:
        if not math.isfinite(highest):
            return Drawn(None)
        if row not in self._logprobs:
            return Drawn(token)
        chosen, ids, values = self._logprobs[row]
        return Drawn(token, TokenLogprobs(float(chosen), tuple(ids.tolist()), tuple(values.tolist())))


class CudaRunner:
    """Runs planned steps on one GPU."""

    overlaps = True

    def __init__(
        self, model: LlamaModel, pool: DevicePool, num_slots: int, limits: Limits, max_context: int, max_cells: int
    ) -> None:
        """max_cells  of an adapter that the tables hold without being made wider"""
        self.model = model
        self.pool = pool
        self.device = pool.cells.device
        self.tables = AdapterTables(num_slots, model.config.num_layers, pool.cells, max_cells)
        self._copies = AdapterCopies(pool.cells)
        self._copied: dict[str, torch.cuda.Event] = {}  # of adapters in host memory: when their last copy was done
        table_pages = pool.geometry.pages_for_tokens(max_context)
        rows = max(limits.max_batch_tokens, limits.max_sequences)
        self._inputs = StepInputs(InputSizes(rows, limits.max_sequences, table_pages), self.device)
        # twice: sequences that ended may still have a row in the step that runs
        self._lanes = Lanes(2 * limits.max_sequences, table_pages)
        self._lane_tokens = torch.zeros(self._lanes.num_lanes + 1, dtype=torch.int64, device=self.device)
        self._graphs: DecodeGraphs | None = None
        self._captured: Tensor | None = None  # the cell table that the graphs read
        self._max_rows = limits.max_sequences

    def write_adapter(self, resident: Resident, packed: PackedAdapter) -> None:
        """See Runner.write_adapter."""
        cells = self.pool.geometry.cell_ids(resident.pages, len(packed.cells))
        host = packed.cells if packed.cells.is_pinned() else packed.cells.pin_memory()
        self._copied[packed.digest] = self._copies.write(host, cells)
        self.tables.publish(resident.slot, packed.layout, cells)

    def settle(self, digest: str) -> None:
        """See Runner.settle."""
        copied = self._copied.pop(digest, None)
        if copied:
            copied.synchronize()

    @torch.inference_mode()
    def capture(self) -> None:
        """Captures the decode graphs: before the first request, and again when the tables have moved."""
        host = self._inputs.begin()
        self._pad(host, 0, self._max_rows)
        self._inputs.send()
        self._captured = self.tables.weights.cells
        self._graphs = DecodeGraphs(self._decode, self._max_rows)
        self._graphs.capture()

    @torch.inference_mode()
    def launch(self, chunks: Sequence[Chunk], adapter_slots: Sequence[int | None]) -> CudaStep:
        """See Runner.launch."""
        order = sorted(range(len(chunks)), key=lambda i: -1 if (slot := adapter_slots[i]) is None else slot)
        chunks = [chunks[i] for i in order]
        slots = np.array([-1 if (slot := adapter_slots[i]) is None else slot for i in order], dtype=np.int32)
        try:
            if all(chunk.count == 1 for chunk in chunks):
                decoded = self._launch_decode(chunks, slots)
                rows = len(chunks)
                decoded = Decoded(decoded.logits[:rows], decoded.tokens[:rows], decoded.highest[:rows])
                return self._sample(chunks, decoded)
            return self._launch_mixed(chunks, slots)
        except torch.AcceleratorError as error:
            raise EngineDead(f"the device {self.device} failed", cause=str(error)) from error

    # --- decode: one row a sequence ---

    def _launch_decode(self, chunks: list[Chunk], slots: np.ndarray) -> Decoded:
        if self._graphs is None or self._captured is not self.tables.weights.cells:
            self.capture()
        assert self._graphs is not None
        rows, with_lora = len(chunks), bool(slots[-1] >= 0)
        if with_lora and self.tables.max_rank > _GRAPH_MAX_RANK:
            self._fill_decode(chunks, slots, rows)
            return self._decode(rows, with_lora, self.tables.max_rank)
        padded = self._graphs.padded(rows)
        self._fill_decode(chunks, slots, padded)
        return self._graphs.replay(padded, with_lora)

    def _fill_decode(self, chunks: list[Chunk], slots: np.ndarray, padded: int) -> None:
        n = len(chunks)
        lanes = self._lanes.of([chunk.sequence for chunk in chunks])
        host = self._inputs.begin()
        positions = np.fromiter((chunk.start for chunk in chunks), np.int64, n)
        host["token_ids"][:n] = [chunk.sequence.tokens[chunk.start] for chunk in chunks]
        host["lanes"][:n] = lanes
        host["sampled_lanes"][:n] = lanes
        host["positions"][:n] = positions
        tables = self._lanes.tables
        page_tokens = self.pool.geometry.page_tokens
        host["slots"][:n] = tables[lanes, positions // page_tokens].astype(np.int64) * page_tokens + (
            positions % page_tokens
        )
        host["seq_lens"][:n] = positions + 1
        host["block_tables"][:n] = tables[lanes]
        self._fill_segments(host, slots, np.ones(n, dtype=np.int64), _DECODE_BLOCK_ROWS)
        self._pad(host, n, padded)
        self._inputs.send()

    def _pad(self, host: dict, first: int, end: int) -> None:
        """Rows that compute nothing anyone reads: no context, no adapter, no place in the KV."""
        host["query_starts"][: end + 1] = np.arange(end + 1)
        host["logits_rows"][:end] = np.arange(end)
        host["token_ids"][first:end] = 0
        host["lanes"][first:end] = self._lanes.spare
        host["sampled_lanes"][first:end] = self._lanes.spare
        host["positions"][first:end] = 0
        host["slots"][first:end] = -1
        host["seq_lens"][first:end] = 0
        if first == 0:
            host["num_segments"][:] = 0

    def _decode(self, rows: int, with_lora: bool, max_rank: int = _GRAPH_MAX_RANK) -> Decoded:
        """The device's part of a decode step, from the inputs as they lie there."""
        inputs = self._inputs.device
        work = None
        if with_lora:
            work = WorkList(inputs["segments"][:rows], inputs["num_segments"], _DECODE_BLOCK_ROWS, max_rank)
        return self._forward(rows, rows, rows, work, max_queries=1, chunks=())

    # --- prompts, alone or with decodes beside them ---

    def _launch_mixed(self, chunks: list[Chunk], slots: np.ndarray) -> CudaStep:
        counts = np.fromiter((chunk.count for chunk in chunks), np.int64, len(chunks))
        ends = counts.cumsum()
        n, num_sequences = int(ends[-1]), len(chunks)
        lanes = self._lanes.of([chunk.sequence for chunk in chunks])
        starts = np.fromiter((chunk.start for chunk in chunks), np.int64, num_sequences)
        owners = np.repeat(np.arange(num_sequences), counts)
        positions = np.arange(n) - (ends - counts - starts)[owners]
        tables = self._lanes.tables
        page_tokens = self.pool.geometry.page_tokens
        samples = np.fromiter((chunk.samples for chunk in chunks), bool, num_sequences)
        m = int(samples.sum())

        host = self._inputs.begin()
        tokens: list[int] = []
        for chunk in chunks:
            tokens += chunk.sequence.tokens[chunk.start : chunk.start + chunk.count]
        host["token_ids"][:n] = tokens
        host["lanes"][:n] = lanes[owners]
        host["positions"][:n] = positions
        host["slots"][:n] = tables[lanes[owners], positions // page_tokens].astype(np.int64) * page_tokens + (
            positions % page_tokens
        )
        host["logits_rows"][:m] = ends[samples] - 1
        host["sampled_lanes"][:m] = lanes[samples]
        host["seq_lens"][:num_sequences] = starts + counts
        host["query_starts"][: num_sequences + 1] = np.concatenate(([0], ends))
        host["block_tables"][:num_sequences] = tables[lanes]
        num_segments = self._fill_segments(host, slots, counts, _PREFILL_BLOCK_ROWS)
        self._inputs.send()
        inputs = self._inputs.device
        work = None
        if num_segments:
            work = WorkList(
                inputs["segments"][:num_segments], inputs["num_segments"], _PREFILL_BLOCK_ROWS, self.tables.max_rank
            )
        decoded = self._forward(n, num_sequences, m, work, max_queries=int(counts.max()), chunks=tuple(chunks))
        return self._sample([chunk for chunk in chunks if chunk.samples], decoded)

    # --- both ---

    def _fill_segments(self, host: dict, slots: np.ndarray, counts: np.ndarray, block_rows: int) -> int:
        """Runs of rows with one adapter, cut to `block_rows`; how many."""
        first_rows = counts.cumsum() - counts
        edges = np.flatnonzero(np.diff(slots, prepend=-1)) if len(slots) else np.empty(0, dtype=np.int64)
        segments = []
        total = int(counts.sum())
        for i, edge in enumerate(edges):
            end = int(first_rows[edges[i + 1]]) if i + 1 < len(edges) else total
            slot = int(slots[edge])
            segments += [
                (slot, row, min(block_rows, end - row)) for row in range(int(first_rows[edge]), end, block_rows)
            ]
        if segments:
            host["segments"][: len(segments)] = segments
        host["num_segments"][:] = len(segments)
        return len(segments)

    def _forward(
        self,
        rows: int,
        num_sequences: int,
        num_sampled: int,
        work: WorkList | None,
        max_queries: int,
        chunks: tuple[Chunk, ...],
    ) -> Decoded:
        inputs = self._inputs.device
        token_ids = inputs["token_ids"][:rows]
        token_ids = torch.where(token_ids == PENDING, self._lane_tokens[inputs["lanes"][:rows]], token_ids)
        batch = Batch(
            chunks=chunks,
            token_ids=token_ids,
            positions=inputs["positions"][:rows],
            slots=inputs["slots"][:rows],
            block_tables=inputs["block_tables"][:num_sequences],
            seq_lens=inputs["seq_lens"][:num_sequences],
            query_starts=inputs["query_starts"][: num_sequences + 1],
            logits_rows=inputs["logits_rows"][:num_sampled],
            work=work,
            max_queries=max_queries,
        )
        logits = self.model.forward(batch, self.pool, self.weights)
        best = logits.max(-1) if num_sampled else None
        if best is None:
            empty = torch.empty(0, device=self.device)
            return Decoded(logits, empty.long(), empty)
        self._lane_tokens.index_copy_(0, inputs["sampled_lanes"][:num_sampled], best.indices)
        return Decoded(logits, best.indices, best.values)

    @property
    def weights(self) -> AdapterWeights:
        return self.tables.weights

    def _sample(self, sampled: list[Chunk], decoded: Decoded) -> CudaStep:
        """Draws the rows that are not greedy, and gathers what clients want to know of the distribution."""
        tokens = decoded.tokens
        draws = [Draw(chunk.sequence.sampling, chunk.sequence.num_generated) for chunk in sampled]
        drawn = [row for row, draw in enumerate(draws) if not draw.sampling.is_greedy]
        if drawn:
            rows = torch.tensor(drawn).pin_memory().to(self.device, non_blocking=True)
            tokens = tokens.clone()
            tokens[rows] = draw_rows(decoded.logits[rows], [draws[row] for row in drawn])
            self._lane_tokens.index_copy_(0, self._inputs.device["sampled_lanes"][: len(sampled)], tokens)
        logprobs = {}
        for row, draw in enumerate(draws):
            if draw.sampling.logprobs is not None:
                logprob = decoded.logits[row].log_softmax(0)
                top = logprob.topk(min(draw.sampling.logprobs, len(logprob)))
                logprobs[row] = (logprob.gather(0, tokens[row : row + 1])[0], top.indices, top.values)
        return CudaStep(sampled, tokens, decoded.highest, logprobs)


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, on its way when this returns."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host
