"""Which rows the next step computes: continuous batching over pages and adapters. Integers only, no torch, no clock.

    plan      running sequences first: a row for each that decodes, then chunks of prompts, oldest first, within
              `max_batch_tokens`; then admissions in order of arrival
    admit     a sequence whose adapter is, or now becomes, resident, and whose tokens fit the free pages with one page
              left in hand for each running sequence. Others are passed over: a request waits for its own adapter, never
              for a neighbour's. One that finds no room for `age_cap_s` closes the door behind it until it is in.
    preempt   when a running sequence needs a page and there is none, idle adapters go first, then the youngest running
              sequence, which gives all its pages back and is computed anew later

The oldest running sequence can always finish: all others can be preempted, their adapters evicted, and a request whose
adapter plus one whole sequence exceeds the pool is refused when it arrives.
"""

from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from flora.errors import Overloaded
from flora.serve.engine.pages import PagePool, Use
from flora.serve.engine.residency import Residency, Resident
from flora.serve.engine.room import Room
from flora.serve.engine.sequence import PENDING, Key, Sequence, State
from flora.serve.request import AdapterTarget


@dataclass(frozen=True, slots=True)
class Limits:
    page_tokens: int
    max_sequences: int  # running at once
    max_batch_tokens: int  # rows of a step
    max_waiting: int  # requests in the queue
    age_cap_s: float = 5.0  # how long a request without room may be overtaken


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence: rows of the next step."""

    sequence: Sequence
    start: int  # position of the first
    count: int
    samples: bool  # its last row is the sequence's last token, so the next one is drawn from it

    @property
    def num_prompt_tokens(self) -> int:
        return max(0, min(self.start + self.count, self.sequence.num_prompt) - self.start)


@dataclass(frozen=True, slots=True)
class Plan:
    chunks: tuple[Chunk, ...]
    placed: tuple[Resident, ...]  # adapters that became resident: to be written before the step runs


class _Admission(Enum):
    ADMITTED = "admitted"
    NOT_READY = "its adapter is not in host memory yet"
    NO_ROOM = "no pages or no slot"


class Scheduler:
    """The queue, the running sequences, and every decision about pages."""

    def __init__(
        self,
        limits: Limits,
        pages: PagePool,
        residency: Residency,
        packed_pages: Callable[[str], int | None],
    ) -> None:
        """packed_pages  of a serving digest: the pages it needs, if it lies packed in host memory"""
        self.limits = limits
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0
        self.room = Room(pages, residency, packed_pages, limits.page_tokens)
        self._pages = pages
        self._residency = residency
        self._packed_pages = packed_pages
        self._waiting: list[Sequence] = []  # oldest first
        self._by_key: dict[Key, Sequence] = {}
        self._waiting_by_adapter: dict[str, dict[Key, Sequence]] = {}

    # --- what there is ---

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_empty(self) -> bool:
        return not self._by_key

    def get(self, key: Key) -> Sequence | None:
        return self._by_key.get(key)

    @property
    def live(self) -> Iterable[Sequence]:
        """Every sequence that waits or runs."""
        return self._by_key.values()

    def of_client(self, client: bytes) -> list[Sequence]:
        """Every live sequence of one front end."""
        return [sequence for sequence in self.live if sequence.key[0] == client]

    def wanted_adapters(self) -> list[AdapterTarget]:
        """What waiting sequences need, each adapter once, in the order in which it was first asked for."""
        firsts = (next(iter(waiting.values())).adapter for waiting in self._waiting_by_adapter.values())
        return [target for target in firsts if target]

    def waiting_by_adapter(self) -> dict[str, int]:
        """Serving digest -> number of waiting sequences."""
        return {digest: len(waiting) for digest, waiting in self._waiting_by_adapter.items()}

    def waiting_for(self, digest: str) -> list[Sequence]:
        return list(self._waiting_by_adapter.get(digest, {}).values())

    # --- arrival and end ---

    def submit(self, sequence: Sequence) -> None:
        """Queues a sequence. Raises Overloaded, and OutOfPages where it could never run."""
        if len(self._waiting) >= self.limits.max_waiting:
            raise Overloaded(f"{len(self._waiting)} requests wait already", fix="try again later, or raise max_waiting")
        self.room.check_sequence(sequence, self.room.for_adapter(sequence.digest) or 0)
        self._by_key[sequence.key] = sequence
        self._enqueue(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Takes the sequence out, in whatever state, with all it holds."""
        if sequence.state is State.RUNNING:
            self._stop(sequence)
        elif sequence.state is State.WAITING:
            self._dequeue(sequence)
        sequence.state = State.FINISHED
        del self._by_key[sequence.key]

    # --- the step ---

    def plan(self, now_s: float) -> Plan:
        """The next step's rows. Every sequence in it has the pages that its rows write to."""
        chunks: list[Chunk] = []
        budget = self.limits.max_batch_tokens
        preemptions = self.num_preemptions
        decoding = [sequence for sequence in self.running if sequence.num_uncomputed == 1 and not sequence.is_full]
        for sequence in decoding[:budget]:
            if sequence.state is State.RUNNING and self._grow(sequence):
                chunks.append(self._chunk(sequence, 1))
        budget -= len(chunks)
        for sequence in self.running:
            if sequence.num_uncomputed > 1 and budget:
                chunks.append(self._chunk(sequence, budget))
                budget -= chunks[-1].count
        placed: list[Resident] = []
        if self.num_preemptions == preemptions:  # pages that were just taken away are not given to a newcomer
            self._admit_waiting(now_s, budget, chunks, placed)
        return Plan(tuple(chunks), tuple(placed))

    def commit(self, plan: Plan) -> None:
        """The plan's rows are launched: whatever is launched later finds their keys and values in place."""
        for chunk in plan.chunks:
            chunk.sequence.num_computed += chunk.count
            if chunk.samples:
                chunk.sequence.tokens.append(PENDING)

    def _chunk(self, sequence: Sequence, budget: int) -> Chunk:
        count = min(sequence.num_uncomputed, budget)
        return Chunk(sequence, sequence.num_computed, count, samples=count == sequence.num_uncomputed)

    def _grow(self, sequence: Sequence) -> bool:
        """A page for the sequence's next token, if it needs one; False if the sequence itself was preempted for it."""
        if len(sequence.pages) * self.limits.page_tokens >= len(sequence.tokens):
            return True
        while not self._residency.reclaim(1):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.pages += self._pages.allocate(1, Use.KV)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        sequence.num_computed = 0
        self.num_preemptions += 1
        self._enqueue(sequence)

    def _admit_waiting(self, now_s: float, budget: int, chunks: list[Chunk], placed: list[Resident]) -> None:
        for sequence in list(self._waiting):
            if not budget or len(self.running) >= self.limits.max_sequences:
                return
            if self._pages.num_free + self._residency.idle_pages <= len(self.running):
                return  # not a page to give: spares the walk through a long queue
            admission = self._admit(sequence, placed)
            if admission is _Admission.ADMITTED:
                chunks.append(self._chunk(sequence, budget))
                budget -= chunks[-1].count
            elif admission is _Admission.NO_ROOM and now_s - sequence.arrived_s >= self.limits.age_cap_s:
                return

    def _admit(self, sequence: Sequence, placed: list[Resident]) -> _Admission:
        residency, digest = self._residency, sequence.digest
        resident = residency.get(digest) if digest else None
        new_pages = self._packed_pages(digest) if digest and resident is None else 0  # of the adapter
        if new_pages is None:
            return _Admission.NOT_READY
        kv_pages = self.room.for_tokens(len(sequence.tokens))
        own_idle = len(resident.pages) if resident and not resident.running and not resident.pinned else 0
        room = self._pages.num_free + residency.idle_pages - own_idle
        if kv_pages + new_pages + len(self.running) > room:
            return _Admission.NO_ROOM
        if sequence.adapter and resident is None:
            if not residency.can_place(new_pages):
                return _Admission.NO_ROOM
            placed.append(residency.place(sequence.adapter, new_pages))
        if digest:
            residency.acquire(digest)
        residency.reclaim(kv_pages)
        self._dequeue(sequence)
        sequence.pages = self._pages.allocate(kv_pages, Use.KV)
        sequence.state = State.RUNNING
        insort(self.running, sequence, key=_age)
        return _Admission.ADMITTED

    # --- the queue and what a sequence holds ---

    def _stop(self, sequence: Sequence) -> None:
        """Out of the running ones; pages and adapter given back."""
        self.running.remove(sequence)
        self._pages.free(sequence.pages)
        sequence.pages = []
        if sequence.digest:
            self._residency.release(sequence.digest)

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.state = State.WAITING
        insort(self._waiting, sequence, key=_age)
        if sequence.digest:
            self._waiting_by_adapter.setdefault(sequence.digest, {})[sequence.key] = sequence

    def _dequeue(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        if sequence.digest:
            waiting = self._waiting_by_adapter[sequence.digest]
            del waiting[sequence.key]
            if not waiting:
                del self._waiting_by_adapter[sequence.digest]


def _age(sequence: Sequence) -> int:
    return sequence.order
