"""Who of the waiting may run now: those whose adapter is, or now becomes, resident, and whose tokens fit.

A sequence is admitted if its pages can be had with one left in hand for each running sequence. Others are passed over:
a request waits for its own adapter, never for a neighbour's. One that finds no room for `max_wait_s` closes the door
behind it until it is in, unless early abort would refuse it.
"""

from bisect import insort
from collections.abc import Iterator
from enum import Enum

from flora.serve.engine.schedule.early_abort import EarlyAbort
from flora.serve.engine.schedule.pages import Use
from flora.serve.engine.schedule.policy import Policy
from flora.serve.engine.schedule.residency import Resident
from flora.serve.engine.schedule.sequence import Sequence, State
from flora.serve.engine.schedule.service import PROMPT_PRICE, Service
from flora.serve.engine.schedule.space import Space
from flora.serve.engine.schedule.waiting import Waiting


class _Answer(Enum):
    ADMITTED = "admitted"
    NOT_READY = "its adapter is not in host memory yet"
    NO_ROOM = "no pages or no slot"


class Admission:
    """Gives sequences from the queue their pages and slots. It holds none itself."""

    def __init__(
        self,
        policy: Policy,
        max_sequences: int,
        space: Space,
        service: Service,
        waiting: Waiting,
    ) -> None:
        self.early_abort = EarlyAbort(policy.slo_ttft_s) if policy.slo_ttft_s is not None else None
        self.num_prompt_tokens = 0  # of admitted prompts, and those that the prefix cache had
        self.num_cached_tokens = 0
        self._policy = policy
        self._max_sequences = max_sequences
        self._space = space
        self._service = service
        self._waiting = waiting

    def is_full(self, num_running: int) -> bool:
        """Not a page to give beside those that running sequences may need next."""
        return self._space.eviction.reclaimable <= num_running

    def admit(self, now_s: float, running: list[Sequence], placed: list[Resident]) -> Iterator[Sequence]:
        """Those who may run, one after the other, now among `running`. What is planned for one comes before the next.

        running, placed  the running sequences, by age, and adapters that became resident: both grow
        """
        if not self._waiting.num_sequences or self._has_no_place(running):
            return  # spares the look at everyone who waits
        newest_first = self.early_abort is not None and self.early_abort.newest_first
        turns = self._waiting.turns(now_s, newest_first=newest_first)
        while not self._has_no_place(running):
            sequence = turns.next()
            if sequence is None:
                return
            answer = self._ask(sequence, now_s, running, placed)
            if answer is _Answer.ADMITTED:
                turns.admitted()
                yield sequence
            elif answer is _Answer.NO_ROOM:
                is_refused_in_time = self.early_abort is not None and sequence.admitted_s is None
                if now_s - sequence.arrived_s >= self._policy.max_wait_s and not is_refused_in_time:
                    return
                turns.passed()
            else:
                self._waiting.lost(sequence.digest)

    def _has_no_place(self, running: list[Sequence]) -> bool:
        return len(running) >= self._max_sequences or self.is_full(len(running))

    def _ask(self, sequence: Sequence, now_s: float, running: list[Sequence], placed: list[Resident]) -> _Answer:
        space, digest, adapter = self._space, sequence.digest, sequence.adapter
        residency, slots = space.residency, space.residency.slots
        resident = residency.get(digest) if digest else None
        new_pages = space.packed_pages(digest) if digest and resident is None else 0  # of the adapter
        if new_pages is None:
            return _Answer.NOT_READY
        found = space.prefixes.find(digest, sequence.tokens) if self._policy.prefix_cache else []
        kv_pages = space.room.for_tokens(len(sequence.tokens)) - len(found)
        own_idle = slots.shared(len(resident.pages)) if resident and not resident.running and not resident.pinned else 0
        own_idle += sum(not page.holders for page in found)
        if kv_pages + slots.shared(new_pages) + len(running) > space.eviction.reclaimable - own_idle:
            return _Answer.NO_ROOM
        if adapter and resident is None and not residency.can_place(new_pages):
            return _Answer.NO_ROOM
        space.prefixes.hold(found)
        if adapter and resident is None:
            resident = residency.place(adapter, new_pages)
            placed.append(resident)
        if resident:
            residency.acquire(resident.digest)
        space.eviction.reclaim(kv_pages)
        self._waiting.remove(sequence)
        sequence.slot = resident.slot if resident else None
        sequence.prefix = found
        sequence.pages = [page.page for page in found] + space.pages.allocate(kv_pages, Use.KV)
        sequence.num_computed = len(found) * space.page_tokens
        sequence.state = State.RUNNING
        insort(running, sequence, key=_age)
        if sequence.admitted_s is None:
            self._note_first(sequence, now_s)
        return _Answer.ADMITTED

    def _note_first(self, sequence: Sequence, now_s: float) -> None:
        """It was never admitted before."""
        sequence.admitted_s = now_s
        sequence.num_cached = sequence.num_computed
        self.num_prompt_tokens += sequence.num_prompt
        self.num_cached_tokens += sequence.num_cached
        if self._policy.fairness:
            self._service.charge(sequence.digest, PROMPT_PRICE * (sequence.num_prompt - sequence.num_cached))
        if self.early_abort:
            self.early_abort.note_admission(sequence)


def _age(sequence: Sequence) -> int:
    return sequence.order
