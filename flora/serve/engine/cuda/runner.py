"""The runner on a GPU: steps overlap, decode replays a graph, and only `collect` waits for the device."""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flora.errors import EngineDead
from flora.kernels import ALL_GROUPS, RANK_LANES, SEGMENT_ROWS, Context, LoraWork, WorkList
from flora.kernels.compiling import compile_kernels
from flora.kernels.draw import draw_tokens
from flora.kernels.tuning import MIDDLE_LIST, SHORT_LIST
from flora.serve.engine.batch import JOINT_ROWS, PREFILL_BLOCK_ROWS, Batch
from flora.serve.engine.cuda.copies import AdapterCopies
from flora.serve.engine.cuda.filling import StepFiller
from flora.serve.engine.cuda.graphs import Reach, StepGraphs, StepOutput, decode_sizes, mixed_sizes
from flora.serve.engine.cuda.inputs import InputSizes, StepInputs
from flora.serve.engine.cuda.lanes import Lanes
from flora.serve.engine.cuda.sampler import pack_draws, top_logprobs
from flora.serve.engine.cuda.step import CudaStep
from flora.serve.engine.layout import stream_alignment
from flora.serve.engine.loading.packing import PackedAdapter
from flora.serve.engine.model.llama import LlamaModel
from flora.serve.engine.pool import DevicePool
from flora.serve.engine.sampler import Draw
from flora.serve.engine.schedule.residency import Resident
from flora.serve.engine.schedule.scheduler import Chunk, Limits
from flora.serve.engine.schedule.sequence import PENDING
from flora.serve.engine.tables import AdapterTables
from flora.serve.request import SamplingParams

logger = logging.getLogger(__name__)

_GRAPH_MAX_RANK = 512  # of a module in a captured step; it sizes buffers that are written only as far as ranks go


class CudaRunner:
    """Runs planned steps on one GPU."""

    overlaps = True

    def __init__(
        self,
        model: LlamaModel,
        pool: DevicePool,
        num_slots: int,
        limits: Limits,
        max_context: int,
        max_cells: int,
        *,
        batch_invariant: bool = False,
        beside_rows: int = 0,
    ) -> None:
        """max_cells  of an adapter that the tables hold without being made wider
        batch_invariant  rows that decode go the way of those that prefill, in one work list
        beside_rows      in steps of at most so many rows low-rank terms are computed beside the base's products
        """
        self.model = model
        self.pool = pool
        self.device = pool.cells.device
        alignment = stream_alignment(model.config, pool.geometry)
        self.tables = AdapterTables(num_slots, model.config.num_layers, pool.adapter_cells, max_cells, alignment)
        self._copies = AdapterCopies(pool.adapter_cells)
        self._copied: dict[str, torch.cuda.Event] = {}  # of adapters in host memory: when their last copy was done
        self._batch_invariant = batch_invariant
        self._beside_rows = 0 if batch_invariant else beside_rows  # the two ways round differently
        self._max_sequences = limits.max_sequences
        self._max_rows = max(limits.max_batch_tokens, limits.max_sequences)
        table_pages = pool.geometry.pages_for_tokens(max_context)
        sizes = InputSizes(self._max_rows, limits.max_sequences, table_pages)
        self._inputs = StepInputs(sizes, self.device)
        # twice: sequences that ended may still have a row in the step that runs
        lanes = Lanes(2 * limits.max_sequences, table_pages)
        self._filler = StepFiller(
            self._inputs, lanes, pool.geometry.page_tokens, lambda: self.tables.ranks, one_list=batch_invariant
        )
        self._logits = torch.empty(
            limits.max_sequences, model.config.vocab_size, dtype=pool.cells.dtype, device=self.device
        )
        self._lane_tokens = torch.zeros(lanes.num_lanes + 1, dtype=torch.int64, device=self.device)
        self._decode_graphs: StepGraphs | None = None
        self._mixed_graphs: StepGraphs | None = None
        self._captured: Tensor | None = None  # the cell table that the graphs read

    def write_adapter(self, resident: Resident, packed: PackedAdapter) -> None:
        """See Runner.write_adapter."""
        cells = self.pool.geometry.cell_ids(resident.pages, len(packed.cells))
        host = packed.cells if packed.cells.is_pinned() else packed.cells.pin_memory()
        if not self.tables.has_room(len(cells)):
            self._copies.wait_for_all()  # what is still to be entered would go to the table that is given up
        self.tables.make_room(len(cells))  # in stream order: what is left of the narrower table may still be read
        self._copied[packed.digest] = self._copies.write(
            resident.slot, host, cells, lambda: self.tables.publish(resident.slot, packed.table, cells)
        )

    def remove_adapter(self, slot: int) -> None:
        """See Runner.remove_adapter."""
        self._copies.wait([slot])
        self.tables.clear(slot)

    def settle(self, digest: str) -> None:
        """See Runner.settle."""
        copied = self._copied.pop(digest, None)
        if copied:
            copied.synchronize()

    @torch.inference_mode()
    def prepare(self) -> None:
        """Compiles the kernels and captures the graphs: before the first request."""
        self._filler.fill_nothing()
        num_kernels = compile_kernels(self._launch_every_kernel, self.device)
        logger.info("%d kernels compiled, or found on the disk", num_kernels)
        self._capture()

    def _capture(self) -> None:
        """Before the first request, and again when the tables have moved."""
        self._filler.fill_nothing()
        self._captured = self.tables.weights.cells
        mixed = StepGraphs(self._mixed, mixed_sizes(self._max_rows))
        mixed.capture()
        decode = StepGraphs(self._decode, decode_sizes(self._max_sequences), mixed.memory)
        decode.capture()
        self._mixed_graphs, self._decode_graphs = mixed, decode

    @torch.inference_mode()
    def launch(self, chunks: Sequence[Chunk], adapter_slots: Sequence[int | None]) -> CudaStep:
        """See Runner.launch."""
        if self._captured is not self.tables.weights.cells:
            self._capture()
        try:
            order = self._filler.order(chunks, adapter_slots)
            chunks = [chunks[i] for i in order]
            slots = np.array([-1 if (slot := adapter_slots[i]) is None else slot for i in order], dtype=np.int32)
            sampled = [chunk for chunk in chunks if chunk.samples]
            self._copies.wait(slots.tolist())
            return self._sample(sampled, self._run(chunks, slots).first(len(sampled)))
        except torch.AcceleratorError as error:  # a GPU answers nothing after one of these
            raise EngineDead(f"the device {self.device} failed", cause=str(error)) from error

    def _run(self, chunks: list[Chunk], slots: np.ndarray) -> StepOutput:
        """Fills the inputs and launches the step: as a graph, unless a rank is beyond what graphs were made for."""
        assert self._decode_graphs is not None
        assert self._mixed_graphs is not None
        counts = np.fromiter((chunk.count for chunk in chunks), np.int64, len(chunks))
        rows, reach = int(counts.sum()), self.tables.groups({slot for slot in slots.tolist() if slot >= 0})
        is_decode = rows == len(chunks)
        graphs, run = (self._decode_graphs, self._decode) if is_decode else (self._mixed_graphs, self._mixed)
        if reach and self.tables.max_rank > _GRAPH_MAX_RANK:
            self._filler.fill(chunks, counts, slots, rows)
            return run(rows, reach, self.tables.max_rank)
        padded = graphs.padded(rows)
        self._filler.fill(chunks, counts, slots, padded)
        return graphs.replay(padded, reach)

    # --- the step on the device ---

    def _launch_every_kernel(self) -> None:
        """Steps that between them launch all that any step does: few rows and many, terms beside, in place, none."""
        beside = max(1, min(self._beside_rows, self._max_rows))
        for reach in (frozenset(), ALL_GROUPS):
            for rows in {1, 2, SHORT_LIST, MIDDLE_LIST, beside, self._max_sequences}:
                self._decode(min(rows, self._max_sequences), reach)
            for rows in {beside, *mixed_sizes(min(JOINT_ROWS, self._max_rows)), self._max_rows}:
                self._mixed(rows, reach)
        likeliest = self._logits[:1].max(-1)
        draws = pack_draws([(0, Draw(SamplingParams(max_tokens=1), 0))], self.device)
        draw_tokens(self._logits[:1], likeliest.values, likeliest.indices, draws)

    def _decode(self, rows: int, reach: Reach, max_rank: int = _GRAPH_MAX_RANK) -> StepOutput:
        """A row a sequence, all of them sampled."""
        work: tuple[LoraWork, ...] = ()
        if reach and self._batch_invariant:
            work = (self._prompts(rows, max_rank),)
        elif reach:
            work = (self._decoding(rows, max_rank),)
        return self._forward(rows, rows, work, reach, max_queries=1)

    def _mixed(self, rows: int, reach: Reach, max_rank: int = _GRAPH_MAX_RANK) -> StepOutput:
        """Any rows of as many sequences as may run."""
        work: tuple[LoraWork, ...] = ()
        if reach and self._batch_invariant:
            work = (self._prompts(rows, max_rank),)
        elif reach and rows <= JOINT_ROWS:
            work = (self._joint(rows, max_rank),)
        elif reach:
            work = (self._decoding(min(rows, self._max_sequences), max_rank), self._prompts(rows, max_rank))
        return self._forward(rows, self._max_sequences, work, reach, max_queries=rows)

    # What `filling` leaves in the lists, as steps of each kind read it.

    def _decoding(self, rows: int, max_rank: int) -> LoraWork:
        return self._work(rows, max_rank)

    def _joint(self, rows: int, max_rank: int) -> LoraWork:
        return self._work(self._inputs.sizes.joint_segments(rows), max_rank)

    def _work(self, segments: int, max_rank: int) -> LoraWork:
        return LoraWork(
            self._list("shrink_segments", segments * RANK_LANES, SEGMENT_ROWS, max_rank),
            self._list("expand_segments", segments, SEGMENT_ROWS, max_rank),
        )

    def _prompts(self, rows: int, max_rank: int) -> LoraWork:
        capacity = min(rows, self._max_sequences) + rows // PREFILL_BLOCK_ROWS
        work = self._list("prefill_segments", capacity, PREFILL_BLOCK_ROWS, max_rank)
        return LoraWork(work, work)

    def _list(self, segments: str, capacity: int, block_rows: int, max_rank: int) -> WorkList:
        inputs = self._inputs.device
        return WorkList(inputs[segments][:capacity], inputs[f"num_{segments}"], block_rows, max_rank)

    def _forward(
        self, rows: int, num_sequences: int, work: tuple[LoraWork, ...], reach: Reach, *, max_queries: int
    ) -> StepOutput:
        inputs = self._inputs.device
        token_ids = inputs["token_ids"][:rows]
        token_ids = torch.where(token_ids == PENDING, self._lane_tokens[inputs["lanes"][:rows]], token_ids)
        batch = Batch(
            chunks=(),
            token_ids=token_ids,
            positions=inputs["positions"][:rows],
            slots=inputs["slots"][:rows],
            context=Context(
                block_tables=inputs["block_tables"][:num_sequences],
                seq_lens=inputs["seq_lens"][:num_sequences],
                query_starts=inputs["query_starts"][: num_sequences + 1],
                max_queries=max_queries,
                prefill_range=inputs["prefill_range"],
            ),
            logits_rows=inputs["logits_rows"][:num_sequences],
            work=work,
            groups=reach,
            adapter_rows=inputs["adapter_rows"][:rows] if rows <= self._beside_rows else None,
        )
        logits = self.model.forward(batch, self.pool, self.tables.weights, self._logits[:num_sequences])
        best = logits.max(-1)
        self._lane_tokens.index_copy_(0, inputs["sampled_lanes"][:num_sequences], best.indices)
        return StepOutput(logits, best.indices, best.values)

    def _sample(self, sampled: list[Chunk], output: StepOutput) -> CudaStep:
        """Draws the rows that are not greedy, and gathers what clients want to know of the distribution."""
        asked = [
            (row, Draw(sequence.sampling, sequence.num_generated))
            for row, sequence in enumerate(chunk.sequence for chunk in sampled)
            if not sequence.sampling.asks_likeliest
        ]
        if not asked:
            return CudaStep(sampled, output.tokens, output.highest)
        tokens = output.tokens.clone()
        log_sums = draw_tokens(output.logits, output.highest, tokens, pack_draws(asked, self.device))
        self._lane_tokens.index_copy_(0, self._inputs.device["sampled_lanes"][: len(sampled)], tokens)
        return CudaStep(sampled, tokens, output.highest, top_logprobs(output.logits, tokens, log_sums, asked))
