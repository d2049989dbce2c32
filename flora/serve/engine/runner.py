"""Everything of the engine that touches the device: the pool, the tables, the model, the sampler."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flora.errors import EngineDead
from flora.serve.engine.batch import Batch, build_batch
from flora.serve.engine.loading.packing import PackedAdapter
from flora.serve.engine.model.llama import LlamaModel
from flora.serve.engine.pool import DevicePool
from flora.serve.engine.sampler import Draw, Drawn, sample
from flora.serve.engine.schedule.residency import Resident
from flora.serve.engine.schedule.scheduler import Chunk
from flora.serve.engine.tables import AdapterTables


class LaunchedStep(Protocol):
    """A step that runs, or has run, on the device."""

    def collect(self) -> list[tuple[Chunk, Drawn]]:
        """The next token of each chunk that ends its sequence's tokens; waits for the device. Raises EngineDead."""
        ...


@dataclass(frozen=True, slots=True)
class DoneStep:
    drawn: list[tuple[Chunk, Drawn]]

    def collect(self) -> list[tuple[Chunk, Drawn]]:
        return self.drawn


class Runner(Protocol):
    """Runs planned steps. It decides nothing: pages, slots and rows come from the scheduler."""

    overlaps: bool  # whether a step may be launched before the last one's tokens are collected
    pool: DevicePool
    tables: AdapterTables

    def write_adapter(self, resident: Resident, packed: PackedAdapter) -> None:
        """From the next step on, rows of the resident's slot meet this adapter."""
        ...

    def remove_adapter(self, slot: int) -> None:
        """The slot's adapter has left: from now on its pages are others', and no row has the slot."""
        ...

    def settle(self, digest: str) -> None:
        """Returns when no copy to the device reads this adapter's host memory any more."""
        ...

    def launch(self, chunks: Sequence[Chunk], adapter_slots: Sequence[int | None]) -> LaunchedStep:
        """Starts a step. adapter_slots  of each chunk: its adapter's row in the tables, None for the base"""
        ...


class SerialRunner:
    """One step at a time, in plain torch calls: the CPU's runner."""

    overlaps = False

    def __init__(self, model: LlamaModel, pool: DevicePool, num_slots: int) -> None:
        self.model = model
        self.pool = pool
        self.tables = AdapterTables(num_slots, model.config.num_layers, pool.adapter_cells)
        self.device = pool.cells.device

    def write_adapter(self, resident: Resident, packed: PackedAdapter) -> None:
        """See Runner.write_adapter."""
        cells = self.pool.write_adapter(resident.pages, packed.cells)
        self.tables.publish(resident.slot, packed.table, cells)

    def remove_adapter(self, slot: int) -> None:
        """See Runner.remove_adapter."""
        self.tables.clear(slot)

    def settle(self, digest: str) -> None:
        """Copies are done when write_adapter returns."""

    def launch(self, chunks: Sequence[Chunk], adapter_slots: Sequence[int | None]) -> LaunchedStep:
        """See Runner.launch."""
        return DoneStep(self.run(chunks, adapter_slots))

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk], adapter_slots: Sequence[int | None]) -> list[tuple[Chunk, Drawn]]:
        """Computes the chunks' rows; the next token of each chunk that ends its sequence's tokens."""
        batch = build_batch(chunks, adapter_slots, self.pool.geometry.page_tokens, self.tables.max_rank, self.device)
        sampled = batch.sampled
        draws = [Draw(chunk.sequence.sampling, chunk.sequence.num_generated) for chunk in sampled]
        return list(zip(sampled, sample(self.forward(batch), draws), strict=True))

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Logits of the batch's sampled rows, float32 [m, vocab_size]. Raises EngineDead if the device is lost."""
        try:
            return self.model.forward(batch, self.pool, self.tables.weights).float()
        except torch.AcceleratorError as error:  # a GPU answers nothing after one of these
            raise EngineDead(f"the device {self.device} failed", cause=str(error)) from error
