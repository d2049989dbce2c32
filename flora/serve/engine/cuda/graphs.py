"""Steps as CUDA graphs, one per padded number of rows and per reach of the adapters in it.

What a step holds (tokens, pages, adapters, ranks) is data in the step's inputs and in the tables, so a graph is
captured once and replayed for any of it. Grids depend on capacities alone (flora/kernels). An adapter's reach, the
groups of modules that it touches, is not: a launch that finds nothing to do still costs 4 us, 64 of them a step.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flora.kernels import ALL_GROUPS, ATTENTION_GROUPS, Group

Reach = frozenset[Group]
_REACHES: tuple[Reach, ...] = (frozenset(), ATTENTION_GROUPS, ALL_GROUPS)


@dataclass(frozen=True, slots=True, eq=False)
class StepOutput:
    """Where a step leaves its results. They hold until the next one is launched."""

    logits: Tensor  # [sampled rows, vocab_size], the model's dtype; the same memory in every graph
    tokens: Tensor  # int64 [sampled rows]: the likeliest
    highest: Tensor  # [sampled rows]: its logit, the model's dtype

    def first(self, count: int) -> "StepOutput":
        return StepOutput(self.logits[:count], self.tokens[:count], self.highest[:count])


# cuBLAS's products of a Llama-7B take longer for 240 rows than for 256, those of a Llama-3-8B half as long again for
# 448 as for 512; the other of the two shapes does not mind (benchmarks/results/products.jsonl, of an H100).
_SLOW_SIZES = (240, 448)


def decode_sizes(max_sequences: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then multiples of 16: at most 31 rows of padding, mostly less than 16."""
    return _sizes((1, 2, 4, 8, *range(16, max_sequences, 16)), max_sequences)


def mixed_sizes(max_rows: int) -> tuple[int, ...]:
    """Multiples of 64, of 128 from 512 on and of 256 from 1,024 on: as much padding at most, and 127 rows past 384."""
    return _sizes((*range(64, 512, 64), *range(512, 1024, 128), *range(1024, max_rows, 256)), max_rows)


def _sizes(usual: Sequence[int], largest: int) -> tuple[int, ...]:
    return (*(size for size in usual if size < largest and size not in _SLOW_SIZES), largest)


class StepGraphs:
    """Captured steps of one kind."""

    def __init__(self, run: Callable[[int, Reach], StepOutput], sizes: Sequence[int], memory: Any = None) -> None:
        """run  (rows, reach) -> its results, from the step's inputs as they lie on the device
        memory  a memory pool to share with other graphs, of which only one ever runs
        """
        self.memory = memory
        self._run = run
        self._sizes = sizes
        self._graphs: dict[tuple[int, Reach], tuple[torch.cuda.CUDAGraph, StepOutput]] = {}

    def padded(self, rows: int) -> int:
        """The rows of the graph that a step of `rows` runs in."""
        return self._sizes[bisect_left(self._sizes, rows)]

    def capture(self) -> None:
        """Captures every size, the largest first, so that the smaller ones find their memory in its."""
        for rows in reversed(self._sizes):
            for reach in _REACHES:
                self._capture(rows, reach)

    def replay(self, rows: int, reach: Reach) -> StepOutput:
        """Launches the graph of exactly `rows` rows, one of the sizes, that reaches as far or farther."""
        graph, output = self._graphs[rows, next(wider for wider in _REACHES if reach <= wider)]
        graph.replay()
        return output

    def _capture(self, rows: int, reach: Reach) -> None:
        self._run(rows, reach)  # compiles kernels and sizes libraries' workspaces: neither can be captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory):
            output = self._run(rows, reach)
        self.memory = graph.pool()
        self._graphs[rows, reach] = graph, output
