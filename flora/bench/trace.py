"""Request traces for serving benchmarks, equal on every machine for equal seeds.

The generator is that of S-LoRA (arXiv:2311.03285, its released benchmark code): power-law popularity, uniform lengths,
Gamma gaps between arrivals. numpy's `RandomState` is frozen, so a seed means the same trace in any numpy; every draw
moves the stream for the next, so their order is part of the definition.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TOKEN_IDS = (10, 30_000)  # [low, high) of prompt tokens: no special tokens, within a vocabulary of 32,000


@dataclass(frozen=True, slots=True)
class Workload:
    """What a trace is drawn from.

    alpha  of popularity: adapter floor(n * u) with u of density alpha * u**(alpha - 1); 1 is uniform, less is skewed
    rate   requests per second; 0 puts all of them at t = 0
    cv     coefficient of variation of the gaps; 1 is Poisson
    """

    num_requests: int
    num_adapters: int  # 0: the base alone, and no popularity is drawn, so the lengths differ from other traces'
    alpha: float = 1.0
    rate: float = 0.0
    cv: float = 1.0
    lengths: tuple[int, int] = (8, 512)  # [low, high) of prompt and of output, tokens


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Requests in order of arrival."""

    adapters: NDArray[np.int64]  # [num_requests] adapter index; all 0 without adapters
    output_lens: NDArray[np.int64]  # [num_requests] tokens to generate, end-of-sequence ignored
    prompts: tuple[tuple[int, ...], ...]  # token ids
    arrivals_s: NDArray[np.float64]  # [num_requests] seconds after the start

    @property
    def num_requests(self) -> int:
        return len(self.prompts)

    @property
    def in_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def out_tokens(self) -> int:
        return int(self.output_lens.sum())

    @property
    def num_distinct(self) -> int:
        return len(np.unique(self.adapters))


def draw_trace(workload: Workload, seed: int) -> Trace:
    """The workload's trace of this seed: adapters, prompt lengths, output lengths, gaps, then prompts one by one."""
    rng = np.random.RandomState(seed)
    n = workload.num_requests
    adapters = np.zeros(n, dtype=np.int64)
    if workload.num_adapters:
        drawn = (workload.num_adapters * rng.power(workload.alpha, n)).astype(np.int64)
        adapters = np.minimum(drawn, workload.num_adapters - 1)  # a draw may round up to 1.0
    prompt_lens = rng.randint(*workload.lengths, n)
    output_lens = rng.randint(*workload.lengths, n)
    arrivals_s = np.zeros(n)
    if workload.rate > 0:
        gaps = rng.gamma(shape=1 / workload.cv**2, scale=workload.cv**2 / workload.rate, size=n)
        arrivals_s = np.cumsum(gaps)
    prompts = tuple(tuple(rng.randint(*TOKEN_IDS, length).tolist()) for length in prompt_lens)
    return Trace(adapters, output_lens, prompts, arrivals_s)
