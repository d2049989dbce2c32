"""Tensors from a checkpoint's files to a GPU, by way of pinned memory.

A copy from a file's map goes through the driver's one small buffer, page fault by page fault. Here `readv` fills one
of two pinned buffers while the other is on its way to the device, and lets go of the interpreter meanwhile, so that
several threads read at once.
"""

import os
from typing import BinaryIO

import torch
from torch import Tensor

from flora.checkpoint import TensorInfo
from flora.errors import CheckpointError
from flora.extract.stopwatch import Stopwatch

BUFFER_BYTES = 16 << 20  # large enough for the bus's full speed, and pinned in a few milliseconds
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}  # by safetensors' words; others are read as Checkpoint.load does


class Staging:
    """One thread's two buffers. On the CPU, where they are not pinned, the same bytes take the same road."""

    def __init__(self, device: torch.device, stopwatch: Stopwatch, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._device = device
        self._stopwatch = stopwatch
        is_cuda = device.type == "cuda"
        self._buffers = [torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(2)]
        self._copied = [torch.cuda.Event() if is_cuda else None for _ in self._buffers]

    def bring(self, info: TensorInfo) -> Tensor:
        """The tensor on the device, its copy under way on the stream in work. Raises CheckpointError."""
        bytes_there = torch.empty(info.num_bytes, dtype=torch.uint8, device=self._device)
        try:
            with info.file.open("rb", buffering=0) as file:
                for turn, piece in enumerate(bytes_there.split(len(self._buffers[0]))):
                    start = info.start + turn * len(self._buffers[0])
                    self._bring_piece(file, start, piece, turn % len(self._buffers))
        except OSError as error:
            raise CheckpointError(f"tensor {info.name} of {info.file} cannot be read", cause=str(error)) from error
        return bytes_there.view(DTYPES[info.dtype]).view(info.shape)

    def _bring_piece(self, file: BinaryIO, start: int, piece: Tensor, place: int) -> None:
        buffer, copied = self._buffers[place][: len(piece)], self._copied[place]
        if copied is not None:
            copied.synchronize()  # what the buffer held last is on the device
        with self._stopwatch.by_clock("read"):
            _read(file, start, buffer)
        with self._stopwatch.on_device("copy"):
            piece.copy_(buffer, non_blocking=True)
        if copied is not None:
            copied.record()


def _read(file: BinaryIO, start: int, buffer: Tensor) -> None:
    """Fills the buffer from `start` on. Raises OSError where the file ends before."""
    left = buffer.numpy().data
    while len(left):
        count = os.preadv(file.fileno(), [left], start)
        if count == 0:
            raise OSError(f"it ends at byte {start}: it was cut since it was opened")
        left, start = left[count:], start + count
