"""A scheduler without an engine: a page holds four tokens, a clock is a number, and memory says who wrote it."""

from collections.abc import Iterable
from typing import Any
from zlib import crc32

from flora.serve.engine.schedule.pages import PagePool
from flora.serve.engine.schedule.policy import Policy
from flora.serve.engine.schedule.scheduler import Chunk, Limits, Plan, Scheduler
from flora.serve.engine.schedule.sequence import PENDING, Sequence, State
from flora.serve.request import AdapterTarget, SamplingParams

PAGE_TOKENS = 4
_NUM_WORDS = 2  # tokens are 0 or 1, so that answers often go on as other prompts do


def _state(before: int | None, digest: str | None, token: int) -> int:
    """What a token's keys and values depend on: the adapter, and all tokens up to it. The same in every process."""
    return crc32(f"{before} {digest} {token}".encode())


def answer(digest: str | None, prompt: Iterable[int], num_tokens: int) -> list[int]:
    """What a request is told, whatever happens around it."""
    state = None
    for token in prompt:
        state = _state(state, digest, token)
    told: list[int] = []
    for _ in range(num_tokens):
        assert state is not None
        told.append(state % _NUM_WORDS)
        state = _state(state, digest, told[-1])
    return told


class Device:
    """Page memory. Each row leaves its state in its slot, made from the state that it reads in the slot before."""

    def __init__(self) -> None:
        self._slots: dict[tuple[int, int], int] = {}
        self._drawn: dict[tuple[Sequence, int], int] = {}  # (sequence, position): also those that nobody was told yet

    def run(self, plan: Plan) -> list[tuple[Chunk, int]]:
        """The next token of each chunk that samples."""
        sampled = []
        for chunk in plan.chunks:
            sequence, pages = chunk.sequence, chunk.sequence.pages
            end = chunk.start + chunk.count
            state = self._slots[self._slot(pages, chunk.start - 1)] if chunk.start else None
            for position in range(chunk.start, end):
                token = sequence.tokens[position]
                state = _state(state, sequence.digest, self._drawn[sequence, position] if token == PENDING else token)
                self._slots[self._slot(pages, position)] = state
            if chunk.samples:
                assert state is not None
                self._drawn[sequence, end] = state % _NUM_WORDS
                sampled.append((chunk, state % _NUM_WORDS))
        return sampled

    def _slot(self, pages: list[int], position: int) -> tuple[int, int]:
        return pages[position // PAGE_TOKENS], position % PAGE_TOKENS


class Desk:
    """A scheduler, its pool, and host memory as a table of digests and pages."""

    def __init__(
        self,
        num_pages: int = 100,
        *,
        packed: dict[str, int] | None = None,
        num_slots: int = 8,
        slot_pages: int | None = None,
        max_sequences: int = 8,
        max_batch_tokens: int = 64,
        max_waiting: int = 100,
        max_context: int = 10_000,
        overlaps: bool = False,
        **policy: Any,
    ) -> None:
        """overlaps  tokens are told one step late, as on a GPU;  policy  fields of Policy; all are off by default"""
        self.packed = dict(packed or {})
        self.pages = PagePool(num_pages + 1)
        limits = Limits(PAGE_TOKENS, max_sequences, max_batch_tokens, max_waiting)
        self.scheduler = Scheduler(limits, Policy(**policy), self.pages, num_slots, self.packed.get, slot_pages)
        self.residency = self.scheduler.residency
        self.prefixes = self.scheduler.prefixes
        self.max_context = max_context
        self.arrivals = 0
        self._device = Device()
        self._overlaps = overlaps
        self._launched: list[tuple[Chunk, int]] = []

    def load(self, adapter: str, num_pages: int) -> None:
        """The adapter is in host memory now."""
        self.packed[adapter] = num_pages
        self.scheduler.adapter_arrived(adapter)

    def sequence(
        self,
        name: str,
        prompt: int | tuple[int, ...],
        max_tokens: int = 8,
        adapter: str | None = None,
        at_s: float = 0.0,
    ) -> Sequence:
        """prompt  its tokens, or how many zeros"""
        target = AdapterTarget(serving_digest=adapter, version_digest=adapter, label=adapter) if adapter else None
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        self.arrivals += 1
        return Sequence(
            (b"", name),
            (0,) * prompt if isinstance(prompt, int) else prompt,
            sampling,
            target,
            order=self.arrivals,
            arrived_s=at_s,
            max_context=self.max_context,
        )

    def submit(self, name: str, prompt: int | tuple[int, ...], **rest: Any) -> Sequence:
        sequence = self.sequence(name, prompt, **rest)
        self.scheduler.submit(sequence)
        return sequence

    def step(self, now_s: float = 0.0) -> dict[str, tuple[int, int]]:
        """Runs one step; each planned request's (first position, rows)."""
        plan = self.scheduler.plan(now_s)
        self.commit(plan)
        return {chunk.sequence.key[1]: (chunk.start, chunk.count) for chunk in plan.chunks}

    def commit(self, plan: Plan) -> None:
        """Runs the plan's rows, and tells the tokens of this step, or where steps overlap of the last one."""
        for resident in self.residency.take_evicted():
            self.scheduler.adapter_left(resident.digest)
        launched = self._device.run(plan)
        self.scheduler.commit(plan)
        if self._overlaps:
            launched, self._launched = self._launched, launched
        for chunk, token in launched:
            self._tell(chunk.sequence, chunk.start + chunk.count, token)

    def _tell(self, sequence: Sequence, place: int, token: int) -> None:
        if sequence.state is State.FINISHED:
            return
        sequence.tokens[place] = token
        told = sequence.tokens[sequence.num_prompt : place + 1]
        assert told == answer(sequence.digest, sequence.tokens[: sequence.num_prompt], len(told)), sequence.key
        if place + 1 >= sequence.max_len:
            self.scheduler.finish(sequence)

    @property
    def waiting(self) -> int:
        return self.scheduler.num_waiting


def names(sequences: Iterable[Sequence]) -> list[str]:
    return [sequence.key[1] for sequence in sequences]
