"""Host memory for packed adapters: one shared allocation, handed out in ranges.

The engine's process owns the ranges; loader processes map the same memory and fill the range they are given. On a GPU
the whole of it is page-locked once, so that every copy to the device is a plain DMA.
"""

import contextlib
import mmap
import os
from bisect import insort
from threading import Lock

import torch
from torch import Tensor

_ALIGN = 4096  # bytes: ranges start on a page of the machine
_MADV_POPULATE_READ = 22  # of Linux; Python has no name for it


class Arena:
    """`num_bytes` of memory in a memfd; child processes that inherit `fd` map it with `map_arena`.

    Any thread may take ranges and give them back.
    """

    def __init__(self, num_bytes: int, *, pinned: bool) -> None:
        self.num_bytes = -(-num_bytes // _ALIGN) * _ALIGN
        self.fd = os.memfd_create("flora-adapters")
        os.ftruncate(self.fd, self.num_bytes)
        self.memory = bytes_of(map_arena(self.fd, self.num_bytes))
        self._lock = Lock()
        self._free: list[tuple[int, int]] = [(0, self.num_bytes)]  # (start, length), by start, never touching
        if pinned:
            self.memory.zero_()  # by every core, since page-locking touches it by one, a page at a time
            code = torch.cuda.cudart().cudaHostRegister(self.memory.data_ptr(), self.num_bytes, 0)
            torch.cuda.check_error(code)
        self._pinned = pinned

    @property
    def num_free(self) -> int:
        with self._lock:
            return sum(length for _, length in self._free)

    def allocate(self, num_bytes: int) -> int | None:
        """Where a range of `num_bytes` starts; None if no gap is as long."""
        length = -(-num_bytes // _ALIGN) * _ALIGN
        with self._lock:
            for i, (start, gap) in enumerate(self._free):
                if gap >= length:
                    self._free[i : i + 1] = [(start + length, gap - length)] if gap > length else []
                    return start
        return None

    def release(self, start: int, num_bytes: int) -> None:
        """Gives a range back; gaps that now touch become one."""
        length = -(-num_bytes // _ALIGN) * _ALIGN
        merged: list[tuple[int, int]] = []
        with self._lock:
            insort(self._free, (start, length))
            for gap_start, gap_length in self._free:
                if merged and merged[-1][0] + merged[-1][1] == gap_start:
                    merged[-1] = (merged[-1][0], merged[-1][1] + gap_length)
                else:
                    merged.append((gap_start, gap_length))
            self._free = merged

    def close(self) -> None:
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr())
        os.close(self.fd)


def map_arena(fd: int, num_bytes: int) -> mmap.mmap:
    """The arena's memory, shared by every process that maps it."""
    return mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED)


def bytes_of(arena: mmap.mmap) -> Tensor:
    """All of it, uint8 [num_bytes]."""
    return torch.frombuffer(arena, dtype=torch.uint8)


def map_pages(arena: mmap.mmap, start: int, num_bytes: int) -> None:
    """Lets this process write a range without a fault for each page: 109 MB take 3 ms here, and 32 one by one.

    Only time depends on it: a kernel before 5.14 does not know how.
    """
    with contextlib.suppress(OSError):
        arena.madvise(_MADV_POPULATE_READ, start, num_bytes)  # of shared memory: what is mapped may be written to


def cells_of(memory: Tensor, start: int, num_cells: int, cell_elements: int, dtype: torch.dtype) -> Tensor:
    """The range at `start` as a packed adapter's cells, [num_cells, cell_elements] of an adapter."""
    num_bytes = num_cells * cell_elements * dtype.itemsize
    return memory[start : start + num_bytes].view(dtype).view(num_cells, cell_elements)
