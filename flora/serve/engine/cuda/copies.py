"""Adapters from pinned host memory to their pages: a few large copies beside the steps.

Copies go to staging buffers on one stream, from there into the pages on another. The second waits for what was launched
before the adapter was given its pages, which may still read them. A step waits for an adapter only if it uses it: the
others never feel how large a load is.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flora.serve.engine.pool import as_words

_STAGING_BYTES = 64 << 20
_NUM_STAGING = 8


class AdapterCopies:
    """Staging buffers, the streams that fill and empty them, and the adapters that are still on their way."""

    def __init__(self, cells: Tensor) -> None:
        """cells  the pool's, [num_cells, adapter_cell_elements]"""
        self._cells = cells = as_words(cells)
        self._device = cells.device
        cell_bytes = cells.shape[1] * cells.element_size()
        rows = max(1, _STAGING_BYTES // cell_bytes)
        self._staging = [torch.empty(rows, cells.shape[1], dtype=cells.dtype, device=cells.device)
                         for _ in range(_NUM_STAGING)]  # fmt: skip
        self._read = [torch.cuda.Event() for _ in self._staging]  # recorded when a buffer's content is in the pages
        self._over_bus = torch.cuda.Stream(cells.device)
        self._into_pages = torch.cuda.Stream(cells.device)
        self._next = 0
        self._arriving: dict[int, torch.cuda.Event] = {}  # by slot: the adapter is in its pages and in the tables

    def write(
        self, slot: int, host: Tensor, cell_ids: NDArray[np.int64], publish: Callable[[], None]
    ) -> torch.cuda.Event:
        """Starts to copy host, [len(cell_ids), adapter_cell_elements] and pinned, into these cells.

        publish  called on the stream that fills the pages, behind the copy: enters the adapter in the tables
        The event says when `host` may be overwritten. Before the slot is used or given up, and its pages with it: wait.
        """
        assert slot not in self._arriving, "a slot is cleared before it is given again"
        arrived = self._arriving[slot] = torch.cuda.Event()
        try:
            return self._launch(host, cell_ids, publish)
        finally:  # if it fails, too: a part of it may be on its way into pages that are given up then
            arrived.record(self._into_pages)

    def wait(self, slots: Iterable[int]) -> None:
        """What is launched after this finds these slots' adapters in their pages."""
        for slot in self._arriving.keys() & set(slots):
            torch.cuda.current_stream(self._device).wait_event(self._arriving.pop(slot))

    def wait_for_all(self) -> None:
        """What is launched after this finds every adapter in its pages, and in the tables."""
        self.wait(list(self._arriving))

    def _launch(self, host: Tensor, cell_ids: NDArray[np.int64], publish: Callable[[], None]) -> torch.cuda.Event:
        """See write. The event says that `host` is read."""
        free = torch.cuda.Event()
        free.record(torch.cuda.current_stream(self._device))
        host, rows = as_words(host), len(self._staging[0])
        with torch.cuda.stream(self._into_pages):
            ids = torch.from_numpy(cell_ids).pin_memory().to(self._device, non_blocking=True)
            self._into_pages.wait_event(free)
        for first in range(0, len(host), rows):
            piece = host[first : first + rows]
            staging, read = self._staging[self._next], self._read[self._next]
            self._next = (self._next + 1) % len(self._staging)
            filled = torch.cuda.Event()
            with torch.cuda.stream(self._over_bus):
                self._over_bus.wait_event(read)
                staging[: len(piece)].copy_(piece, non_blocking=True)
                filled.record(self._over_bus)
            with torch.cuda.stream(self._into_pages):
                self._into_pages.wait_event(filled)
                self._cells.index_copy_(0, ids[first : first + len(piece)], staging[: len(piece)])
                read.record(self._into_pages)
        copied = torch.cuda.Event()
        copied.record(self._over_bus)
        with torch.cuda.stream(self._into_pages):
            publish()
        return copied
