"""Adapters from pinned host memory to their pages: a few large copies beside the running step.

The host-to-device copies go to staging buffers on a stream of their own, so they overlap whatever runs. Only the
scatter into the pages, at device bandwidth, waits its turn in the compute stream, where it also comes after everything
that still read those pages.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_STAGING_BYTES = 64 << 20
_NUM_STAGING = 8


class AdapterCopies:
    """Staging buffers, and the stream that fills them."""

    def __init__(self, cells: Tensor) -> None:
        """cells  the pool's, [num_cells, cell_elements]"""
        self._cells = cells
        cell_bytes = cells.shape[1] * cells.element_size()
        rows = max(1, _STAGING_BYTES // cell_bytes)
        self._staging = [torch.empty(rows, cells.shape[1], dtype=cells.dtype, device=cells.device)
                         for _ in range(_NUM_STAGING)]  # fmt: skip
        self._read = [torch.cuda.Event() for _ in self._staging]  # recorded when a buffer's content is in the pages
        self._stream = torch.cuda.Stream(cells.device)
        self._next = 0

    def write(self, host: Tensor, cell_ids: NDArray[np.int64]) -> torch.cuda.Event:
        """Copies host, [len(cell_ids), cell_elements] and pinned, into these cells; later launches find it there.

        The event says when `host` may be overwritten.
        """
        compute = torch.cuda.current_stream(self._cells.device)
        ids = torch.from_numpy(cell_ids).pin_memory().to(self._cells.device, non_blocking=True)
        rows = len(self._staging[0])
        for first in range(0, len(host), rows):
            piece = host[first : first + rows]
            staging, read = self._staging[self._next], self._read[self._next]
            self._next = (self._next + 1) % len(self._staging)
            filled = torch.cuda.Event()
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(read)
                staging[: len(piece)].copy_(piece, non_blocking=True)
                filled.record(self._stream)
            compute.wait_event(filled)
            self._cells.index_copy_(0, ids[first : first + len(piece)], staging[: len(piece)])
            read.record(compute)
        copied = torch.cuda.Event()
        copied.record(self._stream)
        return copied
