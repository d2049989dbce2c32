"""What one thread works with: memory for a delta, a stopwatch, and on a GPU a stream and pinned buffers of its own."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from flora.checkpoint import Checkpoint
from flora.extract.delta import Workspace
from flora.extract.staging import DTYPES, Staging
from flora.extract.stopwatch import Stopwatch


class Station:
    """Of one thread. `device` is where deltas are taken and factorized."""

    def __init__(self, device: str, *, is_staged: bool | None = None) -> None:
        """is_staged  whether files are read by `Staging` rather than mapped; None: on a GPU"""
        self.device = torch.device(device)
        self.stopwatch = Stopwatch(self.device)
        self.workspace = Workspace(self.device)
        is_cuda = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if is_cuda else None
        staged = is_cuda if is_staged is None else is_staged
        self._staging = Staging(self.device, self.stopwatch) if staged else None

    def at_work(self) -> AbstractContextManager[object]:
        """What is done within happens on this station's stream, beside that of others."""
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def bring(self, checkpoint: Checkpoint, name: str) -> Tensor:
        """The tensor on the device, as `checkpoint` reads it: do not write to it. Raises CheckpointError."""
        if self._staging and type(checkpoint) is Checkpoint and checkpoint.tensors[name].dtype in DTYPES:
            return self._staging.bring(checkpoint.tensors[name])
        with self.stopwatch.by_clock("read"):
            tensor = checkpoint.load(name)
        if self.device.type == "cpu":
            return tensor
        with self.stopwatch.by_clock("copy"):  # from memory that is not pinned, which waits for its end
            return tensor.to(self.device)
