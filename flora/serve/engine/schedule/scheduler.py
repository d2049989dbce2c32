"""Which rows the next step computes: continuous batching over pages and adapters. Integers only, no torch, no clock.

    plan      running sequences first: a row for each that decodes, then chunks of prompts, oldest first, within
              `max_batch_tokens`; then admissions, in the order that waiting.py gives
    admit     a sequence whose adapter is, or now becomes, resident, and whose tokens fit the pages that can be had with
              one left in hand for each running sequence. Others are passed over: a request waits for its own adapter,
              never for a neighbour's. One that finds no room for `max_wait_s` closes the door behind it until it is in.
    share     full pages of a prompt are in the prefix cache from the step on that computes them; whoever is admitted
              after, in that very step too, starts behind them. (A step's rows all store their keys before any attends.)
    preempt   when a running sequence needs a page and there is none, what is idle goes first, then the youngest running
              sequence, which gives all its pages back and is computed anew later

The oldest running sequence can always finish: all others can be preempted, their adapters evicted, and a request whose
adapter plus one whole sequence exceeds the pool is refused when it arrives.
"""

from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from itertools import islice

import msgspec

from flora.errors import Overloaded
from flora.serve.engine.schedule.early_abort import EarlyAbort
from flora.serve.engine.schedule.eviction import Eviction
from flora.serve.engine.schedule.pages import PagePool, Use
from flora.serve.engine.schedule.policy import Policy
from flora.serve.engine.schedule.prefix import PrefixCache
from flora.serve.engine.schedule.residency import Residency, Resident
from flora.serve.engine.schedule.room import Room
from flora.serve.engine.schedule.sequence import PENDING, Key, Sequence, State
from flora.serve.engine.schedule.service import ANSWER_PRICE, PROMPT_PRICE, Service
from flora.serve.engine.schedule.waiting import Waiting
from flora.serve.request import AdapterTarget


@dataclass(frozen=True, slots=True)
class Limits:
    page_tokens: int
    max_sequences: int  # running at once
    max_batch_tokens: int  # rows of a step
    max_waiting: int  # requests in the queue


class Chunk(msgspec.Struct, frozen=True, eq=False, gc=False):  # made 256 times a step: a fifth of a dataclass's time
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
        policy: Policy,
        pages: PagePool,
        num_slots: int,
        packed_pages: Callable[[str], int | None],
    ) -> None:
        """num_slots     adapters on the device at once
        packed_pages  of a serving digest: the pages it needs, if it lies packed in host memory
        """
        self.limits = limits
        self.policy = policy
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0
        self.num_prompt_tokens = 0  # of admitted prompts, and those that the prefix cache had
        self.num_cached_tokens = 0
        self.eviction = Eviction(pages)
        self.residency = Residency(pages, self.eviction, num_slots)
        self.prefixes = PrefixCache(pages, self.eviction, limits.page_tokens)
        self.room = Room(pages, self.residency, packed_pages, limits.page_tokens)
        self._pages = pages
        self._packed_pages = packed_pages
        self._service = Service()
        self._waiting = Waiting(policy, self._service, self.residency, packed_pages)
        self._early_abort = EarlyAbort(policy.slo_ttft_s) if policy.slo_ttft_s is not None else None
        self._by_key: dict[Key, Sequence] = {}

    # --- what there is ---

    @property
    def num_waiting(self) -> int:
        return self._waiting.num_sequences

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

    def wanted_adapters(self) -> Iterable[AdapterTarget]:
        """What is to be loaded now, in the order in which it was first asked for.

        With prefetch all that somebody waits for; without, only what fills the places that nobody else is ready for.
        """
        if self.policy.prefetch:
            return self._waiting.lacking()
        places = self.limits.max_sequences - len(self.running) - self._waiting.num_ready
        return islice(self._waiting.lacking(), 0 if self._is_full else max(0, places))

    def waiting_by_adapter(self) -> dict[str, int]:
        """Serving digest -> number of waiting sequences."""
        return self._waiting.counts()

    def waiting_for(self, digest: str) -> list[Sequence]:
        return self._waiting.of(digest)

    def is_awaited(self, digest: str) -> bool:
        return self._waiting.is_awaited(digest)

    # --- arrival and end ---

    def submit(self, sequence: Sequence) -> None:
        """Queues a sequence. Raises Overloaded, and OutOfPages where it could never run."""
        if self.num_waiting >= self.limits.max_waiting:
            raise Overloaded(f"{self.num_waiting} requests wait already", fix="try again later, or raise max_waiting")
        self.room.check_sequence(sequence, self.room.for_adapter(sequence.digest) or 0)
        self._by_key[sequence.key] = sequence
        self._enqueue(sequence)
        if self._early_abort:
            self._early_abort.note_arrival(sequence)

    def finish(self, sequence: Sequence, *, is_sound: bool = True) -> None:
        """Takes the sequence out, in whatever state, with all it holds.

        is_sound  False: what it computed is not to be trusted, and nobody else shall find it
        """
        if not is_sound:
            self.prefixes.distrust(sequence.prefix)
        if sequence.state is State.RUNNING:
            self._stop(sequence, keeps=is_sound)
        elif sequence.state is State.WAITING:
            self._waiting.remove(sequence)
        sequence.state = State.FINISHED
        del self._by_key[sequence.key]

    def late(self, now_s: float) -> list[Sequence]:
        """Waiting sequences that can no longer have their first token in time: to be refused."""
        return self._early_abort.late(now_s) if self._early_abort else []

    def adapter_arrived(self, digest: str) -> None:
        """The adapter is packed in host memory now."""
        self._waiting.arrived(digest)

    def adapter_left(self, digest: str) -> None:
        """The adapter is no longer on the device, or no longer in host memory."""
        self._waiting.lost(digest)

    # --- the step ---

    def plan(self, now_s: float) -> Plan:
        """The next step's rows. Every sequence in it has the pages that its rows write to."""
        chunks: list[Chunk] = []
        prefilling: list[Sequence] = []
        budget, page_tokens = self.limits.max_batch_tokens, self.limits.page_tokens
        preemptions = self.num_preemptions
        for sequence in tuple(self.running):
            length = len(sequence.tokens)
            uncomputed = length - sequence.num_computed
            if uncomputed > 1:
                prefilling.append(sequence)
            elif uncomputed and budget and length < sequence.max_len and sequence.state is State.RUNNING:
                if len(sequence.pages) * page_tokens < length and not self._grow(sequence):
                    continue
                chunks.append(Chunk(sequence, length - 1, 1, True))
                budget -= 1
        for sequence in prefilling:
            if budget and sequence.state is State.RUNNING:
                chunks.append(self._chunk(sequence, budget))
                budget -= chunks[-1].count
        placed: list[Resident] = []
        if self.num_preemptions == preemptions:  # pages that were just taken away are not given to a newcomer
            self._admit_waiting(now_s, budget, chunks, placed)
        return Plan(tuple(chunks), tuple(placed))

    def commit(self, plan: Plan) -> None:
        """The plan's rows are launched: whatever is launched later finds their keys and values in place."""
        is_fair, charge = self.policy.fairness, self._service.charge
        for chunk in plan.chunks:
            sequence = chunk.sequence
            sequence.num_computed += chunk.count
            if chunk.samples:
                sequence.tokens.append(PENDING)
                if is_fair:
                    charge(sequence.digest, ANSWER_PRICE)

    def _chunk(self, sequence: Sequence, budget: int) -> Chunk:
        uncomputed = sequence.num_uncomputed
        count = min(uncomputed, budget)
        self._publish(sequence, sequence.num_computed + count)
        return Chunk(sequence, sequence.num_computed, count, count == uncomputed)

    def _grow(self, sequence: Sequence) -> bool:
        """A page for the sequence's next token; False if the sequence itself was preempted for it."""
        while not self.eviction.reclaim(1):
            self.prefixes.give_up_twins(sequence.prefix, sequence.pages)
            if self._pages.num_free:
                break
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        sequence.pages += self._pages.allocate(1, Use.KV)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence, keeps=True)
        sequence.num_computed = 0
        self.num_preemptions += 1
        self._enqueue(sequence)

    # --- admission ---

    @property
    def _is_full(self) -> bool:
        """Not a page to give beside those that running sequences may need next."""
        return self.eviction.reclaimable <= len(self.running)

    def _admit_waiting(self, now_s: float, budget: int, chunks: list[Chunk], placed: list[Resident]) -> None:
        if not (budget and self.num_waiting) or len(self.running) >= self.limits.max_sequences or self._is_full:
            return  # spares the look at everyone who waits
        newest_first = self._early_abort is not None and self._early_abort.newest_first
        turns = self._waiting.turns(now_s, newest_first=newest_first)
        while budget and len(self.running) < self.limits.max_sequences and not self._is_full:
            sequence = turns.next()
            if sequence is None:
                return
            admission = self._admit(sequence, now_s, placed)
            if admission is _Admission.ADMITTED:
                turns.admitted()
                chunks.append(self._chunk(sequence, budget))
                budget -= chunks[-1].count
            elif admission is _Admission.NO_ROOM:
                if now_s - sequence.arrived_s >= self.policy.max_wait_s and not self._early_abort:
                    return
                turns.passed()
            else:
                self._waiting.lost(sequence.digest)

    def _admit(self, sequence: Sequence, now_s: float, placed: list[Resident]) -> _Admission:
        residency, digest, adapter = self.residency, sequence.digest, sequence.adapter
        resident = residency.get(digest) if digest else None
        new_pages = self._packed_pages(digest) if digest and resident is None else 0  # of the adapter
        if new_pages is None:
            return _Admission.NOT_READY
        found = self.prefixes.find(digest, sequence.tokens) if self.policy.prefix_cache else []
        kv_pages = self.room.for_tokens(len(sequence.tokens)) - len(found)
        own_idle = len(resident.pages) if resident and not resident.running and not resident.pinned else 0
        own_idle += sum(not page.holders for page in found)
        if kv_pages + new_pages + len(self.running) > self.eviction.reclaimable - own_idle:
            return _Admission.NO_ROOM
        if adapter and resident is None and not residency.can_place(new_pages):
            return _Admission.NO_ROOM
        self.prefixes.hold(found)
        if adapter and resident is None:
            resident = residency.place(adapter, new_pages)
            placed.append(resident)
        if resident:
            residency.acquire(resident.digest)
        self.eviction.reclaim(kv_pages)
        self._waiting.remove(sequence)
        sequence.slot = resident.slot if resident else None
        sequence.prefix = found
        sequence.pages = [page.page for page in found] + self._pages.allocate(kv_pages, Use.KV)
        sequence.num_computed = len(found) * self.limits.page_tokens
        sequence.state = State.RUNNING
        insort(self.running, sequence, key=_age)
        if sequence.admitted_s is None:
            self._note_first_admission(sequence, now_s)
        return _Admission.ADMITTED

    def _note_first_admission(self, sequence: Sequence, now_s: float) -> None:
        sequence.admitted_s = now_s
        sequence.num_cached = sequence.num_computed
        self.num_prompt_tokens += sequence.num_prompt
        self.num_cached_tokens += sequence.num_cached
        if self.policy.fairness:
            self._service.charge(sequence.digest, PROMPT_PRICE * (sequence.num_prompt - sequence.num_cached))
        if self._early_abort:
            self._early_abort.note_admission(sequence)

    # --- what a sequence holds ---

    def _stop(self, sequence: Sequence, *, keeps: bool) -> None:
        """Out of the running ones; pages and adapter given back. keeps: what it computed is for others to find."""
        self.running.remove(sequence)
        if keeps:
            self._publish(sequence, sequence.num_computed)
        shared = {page.page for page in sequence.prefix}
        self._pages.free(page for page in sequence.pages if page not in shared)
        self.prefixes.release(sequence.prefix)
        sequence.pages, sequence.prefix, sequence.slot = [], [], None
        if sequence.digest:
            self.residency.release(sequence.digest)

    def _publish(self, sequence: Sequence, end: int) -> None:
        """Gives the prefix cache the sequence's full pages before position `end`, as far as their tokens are known."""
        if not self.policy.prefix_cache:
            return
        if end and sequence.tokens[end - 1] == PENDING:
            end -= 1
        path, size, tokens = sequence.prefix, self.limits.page_tokens, sequence.tokens
        for index in range(len(path), end // size):
            ours = tuple(tokens[index * size : (index + 1) * size])
            self.prefixes.publish(sequence.digest, path, ours, sequence.pages[index])

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.state = State.WAITING
        self._waiting.add(sequence)


def _age(sequence: Sequence) -> int:
    return sequence.order
