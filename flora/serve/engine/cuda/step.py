"""A step that runs on the GPU: what it drew is on its way to pinned memory, and only `collect` waits for it."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from flora.errors import EngineDead
from flora.serve.engine.cuda.sampler import TopLogprobs
from flora.serve.engine.sampler import Drawn
from flora.serve.engine.schedule.scheduler import Chunk
from flora.serve.messages import TokenLogprobs


class CudaStep:
    """A launched step: its tokens are on their way to pinned memory."""

    def __init__(
        self, sampled: list[Chunk], tokens: Tensor, highest: Tensor, logprobs: TopLogprobs | None = None
    ) -> None:
        """tokens int64, highest [len(sampled)]"""
        self._sampled = sampled
        self._tokens = _to_host(tokens)
        self._highest = _to_host(highest)
        self._logprobs = logprobs and replace(
            logprobs, chosen=_to_host(logprobs.chosen), ids=_to_host(logprobs.ids), values=_to_host(logprobs.values)
        )
        self._done = torch.cuda.Event()
        self._done.record()

    def collect(self) -> list[tuple[Chunk, Drawn]]:
        """See LaunchedStep.collect."""
        try:
            self._done.synchronize()
        except torch.AcceleratorError as error:  # a GPU answers nothing after one of these
            raise EngineDead("the GPU failed in a step", cause=str(error)) from error
        logprobs = self._told()
        return [
            (chunk, Drawn(token, logprobs.get(row)) if math.isfinite(highest) else Drawn(None))
            for row, (chunk, token, highest) in enumerate(
                zip(self._sampled, self._tokens.tolist(), self._highest.tolist(), strict=True)
            )
        ]

    def _told(self) -> dict[int, TokenLogprobs]:
        """Row -> its log probabilities."""
        found = self._logprobs
        if found is None:
            return {}
        of_rows = zip(
            found.rows, found.num_top, found.chosen.tolist(), found.ids.tolist(), found.values.tolist(), strict=True
        )
        return {
            row: TokenLogprobs(chosen, tuple(ids[:num_top]), tuple(values[:num_top]))
            for row, num_top, chosen, ids, values in of_rows
        }


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, on its way when this returns."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host
