"""The sequences that wait: a queue for each adapter, and the order in which they get their turn."""

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush

from flora.serve.engine.schedule.policy import Policy
from flora.serve.engine.schedule.residency import Residency
from flora.serve.engine.schedule.sequence import Sequence
from flora.serve.engine.schedule.service import Service
from flora.serve.request import AdapterTarget

_MAX_PASSED = 64  # of those without room, in one step: a long queue is not walked to its end at every step


class _Queue:
    """Who waits for one adapter, oldest first."""

    __slots__ = ("sequences", "turn_s")

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []
        self.turn_s = -math.inf  # when one of them last had a turn


class Waiting:
    """Queues by serving digest; that of None waits for the base."""

    def __init__(
        self, policy: Policy, service: Service, residency: Residency, packed_pages: Callable[[str], int | None]
    ) -> None:
        """packed_pages  of a serving digest: the pages it needs, if it lies packed in host memory"""
        self.num_sequences = 0
        self._policy = policy
        self._service = service
        self._residency = residency
        self._packed_pages = packed_pages
        self._queues: dict[str | None, _Queue] = {}
        self._lacking: dict[str, None] = {}  # adapters that are still to be loaded, in the order of their requests

    # --- what there is ---

    def of(self, digest: str | None) -> list[Sequence]:
        """Those that wait for one adapter, oldest first."""
        queue = self._queues.get(digest)
        return list(queue.sequences) if queue else []

    @property
    def num_ready(self) -> int:
        """Sequences whose adapter is here."""
        return self.num_sequences - sum(len(self._queues[digest].sequences) for digest in self._lacking)

    def is_awaited(self, digest: str) -> bool:
        return digest in self._queues

    def counts(self) -> dict[str, int]:
        """Serving digest -> how many wait."""
        return {digest: len(queue.sequences) for digest, queue in self._queues.items() if digest is not None}

    def lacking(self) -> Iterator[AdapterTarget]:
        """Adapters that somebody waits for and that are not in host memory, in the order of their requests."""
        for digest in self._lacking:
            target = self._queues[digest].sequences[0].adapter
            assert target is not None
            yield target

    # --- changes ---

    def add(self, sequence: Sequence) -> None:
        digest = sequence.digest
        queue = self._queues.get(digest)
        if queue is None:
            if self._policy.fairness:
                self._service.join(digest, self._queues)
            queue = self._queues[digest] = _Queue()
            if digest is not None and not self._has(digest):
                self._lacking[digest] = None
        insort(queue.sequences, sequence, key=_age)
        self.num_sequences += 1

    def remove(self, sequence: Sequence) -> None:
        digest = sequence.digest
        queue = self._queues[digest]
        place = bisect_left(queue.sequences, sequence.order, key=_age)
        assert queue.sequences[place] is sequence
        del queue.sequences[place]
        self.num_sequences -= 1
        if not queue.sequences:
            del self._queues[digest]
            if digest is not None:
                self._lacking.pop(digest, None)
            if self._policy.fairness:
                self._service.leave(digest, self._queues)

    def arrived(self, digest: str) -> None:
        """The adapter is in host memory now."""
        self._lacking.pop(digest, None)

    def lost(self, digest: str | None) -> None:
        """The adapter is no longer on the device; whoever waits for it may need it to be loaded again."""
        if digest is not None and digest in self._queues and not self._has(digest):
            self._lacking[digest] = None

    def turns(self, now_s: float, *, newest_first: bool) -> "Turns":
        """Everybody whose adapter is here, in the order of this moment."""
        lacking = self._lacking
        ready = {digest: queue for digest, queue in self._queues.items() if digest not in lacking}
        return Turns(ready, self._policy, self._service, self._residency, now_s, newest_first)

    def _has(self, digest: str) -> bool:
        return self._residency.get(digest) is not None or self._packed_pages(digest) is not None


# What decides between two queues; the smaller goes first.
#   0  preempted, or, where others may overtake it, without a turn for max_wait_s      then by age
#   1  anyone else                                               then by what the adapter was served, then by age
#   2  its adapter does not run, and `cluster` adapters do       likewise
# Preempted is who has a token; where the newest go first, whoever was admitted before, since nobody refuses him.
_Claim = tuple[int, int, int, str | None, int]


class Turns:
    """One step's turns. After each `next` the caller says what became of it: admitted, passed, or neither: its adapter
    is not here after all, and its queue has no further turn.
    """

    def __init__(
        self,
        queues: dict[str | None, _Queue],
        policy: Policy,
        service: Service,
        residency: Residency,
        now_s: float,
        newest_first: bool,
    ) -> None:
        self._queues = queues
        self._policy = policy
        self._service = service
        self._residency = residency
        self._now_s = now_s
        self._newest_first: dict[str | None, list[Sequence]] | None = None
        if newest_first:
            self._newest_first = {digest: _newest_first(queue) for digest, queue in queues.items()}
        self._may_overtake = (policy.fairness or policy.cluster is not None) and policy.slo_ttft_s is None
        self._num_passed = 0
        self._digest: str | None = None  # of whom it is the turn, and its place in the queue
        self._place = 0
        self._claims = self._first_claims()
        heapify(self._claims)

    def _first_claims(self) -> list[_Claim]:
        """Each queue's claim. Without clustering most are alike: thousands of adapters may wait, at every step."""
        if self._policy.cluster is not None or self._newest_first is not None:
            return [self._claim(digest, queue, 0) for digest, queue in self._queues.items()]
        served = self._service.counters if self._policy.fairness else {}
        since_s = self._now_s - self._policy.max_wait_s if self._may_overtake else -math.inf
        claims: list[_Claim] = []
        for digest, queue in self._queues.items():
            head = queue.sequences[0]
            is_preempted = len(head.tokens) > head.num_prompt
            goes_first = is_preempted or (head.arrived_s <= since_s and queue.turn_s <= since_s)
            order = head.order
            claims.append((0, 0, order, digest, 0) if goes_first else (1, served.get(digest, 0), order, digest, 0))
        return claims

    def next(self) -> Sequence | None:
        """Whose turn it is; None if nobody is left."""
        while self._claims and self._num_passed < _MAX_PASSED:
            claim = heappop(self._claims)
            self._digest, self._place = claim[3], claim[4]
            queue = self._queues[self._digest]
            now = self._claim(self._digest, queue, self._place)
            if now > claim:  # it was made before others were admitted
                heappush(self._claims, now)
                continue
            return self._at(self._digest, self._place)
        return None

    def admitted(self) -> None:
        """It is out of its queue."""
        self._queues[self._digest].turn_s = self._now_s
        if self._newest_first is not None:
            del self._newest_first[self._digest][self._place]
        self._push(self._place)

    def passed(self) -> None:
        """There is no room for it now."""
        self._num_passed += 1
        self._push(self._place + 1)

    def _push(self, place: int) -> None:
        queue = self._queues[self._digest]
        if place < len(queue.sequences):
            heappush(self._claims, self._claim(self._digest, queue, place))

    def _claim(self, digest: str | None, queue: _Queue, place: int) -> _Claim:
        sequence, policy = self._at(digest, place), self._policy
        if sequence.num_generated or (self._newest_first is not None and sequence.admitted_s is not None):
            return 0, 0, sequence.order, digest, place
        since_s = self._now_s - policy.max_wait_s
        if self._may_overtake and sequence.arrived_s <= since_s and queue.turn_s <= since_s:
            return 0, 0, sequence.order, digest, place
        rank = 1
        if policy.cluster is not None and digest is not None and self._residency.num_running >= policy.cluster:
            resident = self._residency.get(digest)
            rank = 1 if resident and resident.running else 2
        served = self._service.counter(digest) if policy.fairness else 0
        return rank, served, sequence.order if self._newest_first is None else -sequence.order, digest, place

    def _at(self, digest: str | None, place: int) -> Sequence:
        """Oldest first, or newest first behind those that were preempted."""
        order = self._queues[digest].sequences if self._newest_first is None else self._newest_first[digest]
        return order[place]


def _newest_first(queue: _Queue) -> list[Sequence]:
    """Newest first, behind those that were preempted: nobody refuses these, and each newcomer would pass them."""
    preempted = [sequence for sequence in queue.sequences if sequence.admitted_s is not None]
    if not preempted:
        return queue.sequences[::-1]
    return preempted + [sequence for sequence in reversed(queue.sequences) if sequence.admitted_s is None]


def _age(sequence: Sequence) -> int:
    return sequence.order
