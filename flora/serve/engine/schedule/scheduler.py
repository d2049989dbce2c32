"""Which rows the next step computes: continuous batching over pages and adapters. Integers only, no torch, no clock.

    plan      running sequences first: a row for each that decodes, then chunks of prompts, oldest first, within
              the step's rows (`Limits.rows_of_step`); then admissions, in the order that waiting.py gives
    admit     whoever fits, see admission.py
    share     full pages of a prompt are in the prefix cache from the step on that computes them; whoever is admitted
              after, in that very step too, starts behind them. (A step's rows all store their keys before any attends.)
    preempt   when a running sequence needs a page and there is none, what is idle goes first, then the youngest running
              sequence, which gives all its pages back and is computed anew later

The oldest running sequence can always finish: all others can be preempted, their adapters evicted, and a request whose
adapter plus one whole sequence exceeds the pool is refused when it arrives.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

import msgspec

from flora.errors import Overloaded
from flora.serve.engine.schedule.admission import Admission
from flora.serve.engine.schedule.pages import PagePool, Use
from flora.serve.engine.schedule.policy import Policy
from flora.serve.engine.schedule.residency import Resident
from flora.serve.engine.schedule.sequence import PENDING, Key, Sequence, State
from flora.serve.engine.schedule.service import ANSWER_PRICE, Service
from flora.serve.engine.schedule.space import make_space
from flora.serve.engine.schedule.waiting import Waiting
from flora.serve.request import AdapterTarget

CROWDED_ROWS = 512  # of a step on an H100, where its products stop waiting for weights and begin to wait for arithmetic


@dataclass(frozen=True, slots=True)
class Limits:
    page_tokens: int
    max_sequences: int  # running at once
    max_batch_tokens: int  # rows of a step
    max_waiting: int  # requests in the queue

    def rows_of_step(self, num_decoding: int) -> int:
        """The most rows of a step in which so many sequences decode.

        A step reads the base's weights for whatever rows it has, so up to CROWDED_ROWS a prompt's rows cost less beside
        decoding ones than in a step of their own (Sarathi-Serve, arXiv:2403.02310, section 4.3). While half of the
        places are empty, filling them comes first; from then on prompts ride along, a part in every step.
        """
        if 2 * num_decoding < self.max_sequences:
            return self.max_batch_tokens
        return min(self.max_batch_tokens, max(CROWDED_ROWS, 2 * self.max_sequences))


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


class Scheduler:
    """The queue, the running sequences, and every decision about pages."""

    def __init__(
        self,
        limits: Limits,
        policy: Policy,
        pages: PagePool,
        num_slots: int,
        packed_pages: Callable[[str], int | None],
        slot_pages: int | None = None,
    ) -> None:
        """num_slots     adapters on the device at once
        packed_pages  of a serving digest: the pages it needs, if it lies packed in host memory
        slot_pages    set aside for each slot; None: adapters take the pages that they need
        """
        self.limits = limits
        self.policy = policy
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0
        space = make_space(pages, limits.page_tokens, num_slots, packed_pages, slot_pages)
        self.eviction = space.eviction
        self.residency = space.residency
        self.prefixes = space.prefixes
        self.room = space.room
        self._pages = pages
        self._service = Service()
        self._waiting = Waiting(policy, self._service, self.residency, packed_pages)
        self._admission = Admission(policy, limits.max_sequences, space, self._service, self._waiting)
        self._by_key: dict[Key, Sequence] = {}

    # --- what there is ---

    @property
    def num_waiting(self) -> int:
        return self._waiting.num_sequences

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts that were admitted."""
        return self._admission.num_prompt_tokens

    @property
    def num_cached_tokens(self) -> int:
        """Those of them that the prefix cache had."""
        return self._admission.num_cached_tokens

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
        return islice(self._waiting.lacking(), 0 if self._admission.is_full(len(self.running)) else max(0, places))

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
        if self._admission.early_abort:
            self._admission.early_abort.note_arrival(sequence)

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
        early_abort = self._admission.early_abort
        return early_abort.late(now_s, is_idle=not self.running) if early_abort else []

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
        num_decoding, most, page_tokens = 0, self.limits.max_batch_tokens, self.limits.page_tokens
        preemptions = self.num_preemptions
        for sequence in tuple(self.running):
            length = len(sequence.tokens)
            uncomputed = length - sequence.num_computed
            if uncomputed > 1:
                prefilling.append(sequence)
            elif uncomputed and num_decoding < most and length < sequence.max_len and sequence.state is State.RUNNING:
                if len(sequence.pages) * page_tokens < length and not self._grow(sequence):
                    continue
                chunks.append(Chunk(sequence, length - 1, 1, True))
                num_decoding += 1
        budget = self.limits.rows_of_step(num_decoding) - num_decoding
        for sequence in prefilling:
            if budget and sequence.state is State.RUNNING:
                chunks.append(self._chunk(sequence, budget))
                budget -= chunks[-1].count
        placed: list[Resident] = []
        if budget and self.num_preemptions == preemptions:  # pages that were just taken away are not for a newcomer
            for sequence in self._admission.admit(now_s, self.running, placed):
                chunks.append(self._chunk(sequence, budget))
                budget -= chunks[-1].count
                if not budget:
                    break
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
