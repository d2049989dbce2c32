"""A step that runs on the GPU: what it drew is on its way to pinned memory, and only `collect` waits for it."""

import math

import torch
from torch import Tensor

from flora.errors import EngineDead
from flora.serve.engine.sampler import Drawn
from flora.serve.engine.schedule.scheduler import Chunk
from flora.serve.messages import TokenLogprobs


class CudaStep:
    """A launched step: its tokens are on their way to pinned memory."""

    def __init__(
        self, sampled: list[Chunk], tokens: Tensor, highest: Tensor, logprobs: dict[int, tuple[Tensor, Tensor, Tensor]]
    ) -> None:
        """tokens int64, highest [len(sampled)]; logprobs  of a row: chosen [], the top's ids and values [k]"""
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


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, on its way when this returns."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host
