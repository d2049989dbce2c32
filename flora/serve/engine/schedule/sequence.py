"""A request's life inside the engine: the mutable one. Integers only."""

from enum import Enum

from flora.serve.engine.schedule.prefix import PrefixPage
from flora.serve.request import AdapterTarget, SamplingParams

Key = tuple[bytes, str]  # front end's identity, its request id

PENDING = -1  # stands in `tokens` for one that a launched step is still drawing; no token id is negative


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One request's tokens and pages. The engine thread owns it."""

    __slots__ = (
        "adapter",
        "admitted_s",
        "arrived_s",
        "digest",
        "key",
        "max_len",
        "num_cached",
        "num_computed",
        "num_prompt",
        "order",
        "pages",
        "prefix",
        "sampling",
        "slot",
        "state",
        "tokens",
    )

    def __init__(
        self,
        key: Key,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        adapter: AdapterTarget | None,
        *,
        order: int,
        arrived_s: float,
        max_context: int,
    ) -> None:
        self.key = key
        self.tokens = list(prompt)  # prompt and answer
        self.num_prompt = len(prompt)
        self.num_computed = 0  # tokens whose keys and values are in `pages`
        self.pages: list[int] = []  # in token order
        self.prefix: list[PrefixPage] = []  # what it holds of the prefix cache, in token order: its first pages, or
        # twins of them where somebody else had computed the same
        self.num_cached = 0  # tokens of the prompt that it found there when it was first admitted
        self.sampling = sampling
        self.adapter = adapter
        self.digest = adapter.serving_digest if adapter else None  # None for the base
        self.slot: int | None = None  # of its adapter in the kernels' tables, while it runs; None for the base
        self.order = order  # arrival number: age, and so priority; it survives a preemption
        self.arrived_s = arrived_s
        self.admitted_s: float | None = None  # first; None before
        self.max_len = min(len(prompt) + sampling.max_tokens, max_context)
        self.state = State.WAITING

    @property
    def is_full(self) -> bool:
        """No token can follow: the last is drawn, or being drawn."""
        return len(self.tokens) >= self.max_len

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed
