"""Decode steps as CUDA graphs, one per padded number of rows, with and without LoRA.

What a step holds (tokens, pages, adapters, ranks) is data in the step's inputs and in the tables, so a graph is
captured once and replayed for any of it. Grids depend on capacities alone (flora/kernels).
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_POWERS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """Where a decode step leaves its results. They hold until the next one is launched."""

    logits: Tensor  # float32 [rows, vocab_size]
    tokens: Tensor  # int64 [rows]: the likeliest
    highest: Tensor  # float32 [rows]: its logit


def graph_sizes(max_rows: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then multiples of 16: at most 15 rows of padding."""
    sizes = {size for size in (*_POWERS, *range(16, max_rows, 16)) if size < max_rows}
    return (*sorted(sizes), max_rows)


class DecodeGraphs:
    """Captured decode steps of one runner."""

    def __init__(self, decode: Callable[[int, bool], Decoded], max_rows: int) -> None:
        """decode  (rows, with LoRA) -> its results, from the step's inputs as they lie on the device"""
        self._decode = decode
        self.sizes = graph_sizes(max_rows)
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Decoded]] = {}
        self._memory: Any = None  # torch names no type for a memory pool's handle

    def padded(self, rows: int) -> int:
        """The rows of the graph that a step of `rows` runs in."""
        return self.sizes[bisect_left(self.sizes, rows)]

    def capture(self) -> None:
        """Captures every size, the largest first, so that the smaller ones find their memory in its."""
        for rows in reversed(self.sizes):
            for with_lora in (False, True):
                self._capture(rows, with_lora)

    def replay(self, rows: int, with_lora: bool) -> Decoded:
        """Launches the graph of exactly `rows` rows, one of `sizes`."""
        graph, decoded = self._graphs[rows, with_lora]
        graph.replay()
        return decoded

    def _capture(self, rows: int, with_lora: bool) -> None:
        self._decode(rows, with_lora)  # compiles kernels and sizes libraries' workspaces: neither can be captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            decoded = self._decode(rows, with_lora)
        self._memory = graph.pool()
        self._graphs[rows, with_lora] = graph, decoded
