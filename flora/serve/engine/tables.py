"""The kernels' tables of resident adapters: a row per slot, written when an adapter becomes resident."""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flora.kernels import CHUNK, MODULES, AdapterWeights, Group
from flora.serve.engine.layout import AdapterTable


class AdapterTables:
    """Which cells a slot's adapter lies in, and where in its stream each factor starts."""

    def __init__(
        self, num_slots: int, num_layers: int, pool_cells: Tensor, max_cells: int = 64, alignment: int = CHUNK
    ) -> None:
        """max_cells  of an adapter, at first: a larger one makes the table wider, and it then lies elsewhere
        alignment  elements on which every stored matrix starts: layout.stream_alignment
        """
        self._alignment = alignment
        self._pool_cells = pool_cells
        device = pool_cells.device
        self._cells = torch.zeros(num_slots, max_cells, dtype=torch.int32, device=device)
        self._modules = torch.zeros(num_slots, num_layers, len(MODULES), 3, dtype=torch.int32, device=device)
        self._scales = torch.zeros(num_slots, num_layers, len(MODULES), dtype=torch.float32, device=device)
        self._max_ranks = [0] * num_slots
        self._groups: list[frozenset[Group]] = [frozenset()] * num_slots

    @property
    def weights(self) -> AdapterWeights:
        return AdapterWeights(self._pool_cells, self._cells, self._modules, self._scales, self._alignment)

    @property
    def max_rank(self) -> int:
        """The highest rank of any module of a resident adapter."""
        return max(self._max_ranks)

    @property
    def ranks(self) -> list[int]:
        """Each slot's highest rank; 0 for a free one."""
        return self._max_ranks

    def groups(self, slots: Iterable[int]) -> frozenset[Group]:
        """Which groups of modules any of these slots' adapters touches."""
        return frozenset[Group]().union(*(self._groups[slot] for slot in slots))

    def has_room(self, num_cells: int) -> bool:
        """Whether an adapter of so many cells is entered without the cell table becoming wider."""
        return num_cells <= self._cells.shape[1]

    def make_room(self, num_cells: int) -> None:
        """Widens the cell table where it must be: no bound on an adapter's size is known when the server starts.

        It copies what is in the narrower table when this runs on the device: entries that another stream is still to
        make are lost, unless this stream waits for them first.
        """
        width = self._cells.shape[1]
        while width < num_cells:
            width *= 2
        if width > self._cells.shape[1]:
            wider = torch.zeros(len(self._cells), width, dtype=torch.int32, device=self._cells.device)
            wider[:, : self._cells.shape[1]] = self._cells
            self._cells = wider

    def publish(self, slot: int, table: AdapterTable, cells: NDArray[np.int64]) -> None:
        """From the next step on, rows of `slot` meet this adapter."""
        self.make_room(len(cells))
        modules = np.frombuffer(table.records, np.int32).reshape(self._modules.shape[1:])
        scales = np.frombuffer(table.scales, np.float32).reshape(self._scales.shape[1:])
        self._fill(self._cells[slot, : len(cells)], cells.astype(np.int32))
        self._fill(self._modules[slot], modules.copy())  # torch warns of memory that is only to be read
        self._fill(self._scales[slot], scales.copy())
        self._max_ranks[slot] = table.max_rank
        touched = set(np.flatnonzero(modules[:, :, 0].any(axis=0)).tolist())
        self._groups[slot] = frozenset(group for group in Group if touched.intersection(group.value))

    def clear(self, slot: int) -> None:
        """The slot's adapter has left the device."""
        self._modules[slot] = 0
        self._max_ranks[slot] = 0
        self._groups[slot] = frozenset()

    def _fill(self, place: Tensor, values: np.ndarray) -> None:
        """In stream order, without a wait: from pinned memory, which torch keeps until the copy is done."""
        host = torch.from_numpy(values)
        place.copy_(host.pin_memory() if place.is_cuda else host, non_blocking=True)
