"""What `flora bench serve` measures: a base, adapters of it, requests, and an engine. Settings by name.

S1, S2 and S4 are S-LoRA's (arXiv:2311.03285, table 1), on its shapes; G1 is the grouped-query shape of Llama-3-8B with
S2's ranks; small is for a CPU.
"""

from dataclasses import dataclass

from flora.serve.config import EngineConfig

WARM_UP_SEED, WARM_UP_REQUESTS, WARM_UP_ADAPTERS = 7, 40, 8


@dataclass(frozen=True, slots=True)
class Setting:
    """What is asked: a base of random weights, adapters of it, and requests of random lengths."""

    shape: str  # one of shapes.SHAPES
    modules: str  # one of shapes.MODULE_SETS
    ranks: tuple[int, ...]  # adapter number i has rank ranks[i % len(ranks)]
    adapters: tuple[int, ...]  # how many there are, one measurement each; 0 is the base alone
    num_requests: int = 600
    lengths: tuple[int, int] = (8, 512)  # [low, high) of prompt and of answer, tokens
    # So many adapters on the device at once, each filled up to the largest rank with zeros, in memory that is set aside
    # for it; None: a unified pool of true ranks.
    fixed_slots: int | None = None

    @property
    def is_padded(self) -> bool:
        return self.fixed_slots is not None

    def rank(self, number: int) -> int:
        """Of adapter number `number`, as it is stored."""
        return max(self.ranks) if self.is_padded else self.ranks[number % len(self.ranks)]


SETTINGS = {
    "S1": Setting("llama-7b", "attention", (8,), (0, 5, 100, 1000, 2000)),
    "S2": Setting("llama-7b", "attention", (64, 32, 16, 8), (0, 5, 100, 1000, 2000)),
    "S4": Setting("llama-13b", "attention", (64, 32, 16), (0, 2, 100, 400, 1000)),
    "G1": Setting("llama3-8b", "attention", (64, 32, 16, 8), (0, 5, 100, 1000)),
    "small": Setting("smollm2-135m", "attention", (16, 8), (0, 4), num_requests=24, lengths=(8, 64)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeBench:
    """One command's worth of measurements: for each number of adapters an engine, for each seed a pass over it."""

    setting: Setting
    engine: EngineConfig  # base, registry and cache lie where the benchmark puts them, whatever stands here
    seeds: tuple[int, ...] = (42,)  # the first pass over an engine is cold, the others are warm
    alpha: float = 1.0  # of popularity, see trace.Workload
    rate: float = 0.0  # requests per second; 0: all of them at t = 0
    cv: float = 1.0  # of the gaps between them
    cancel: float = 0.0  # share of the requests that are cancelled midway
    temperature: float = 0.0  # of every request; 0: greedy
    top_p: float = 1.0
    slo_ttft_s: float = 6.0  # what attainment is counted by; S-LoRA's
    merged: bool = False  # each adapter's requests on their own, as if it were merged into the base
    merged_turn_tokens: int | None = None  # see merged.merged_turns
    beside: int = 0  # adapters that are on the device from the start, and that no request names
