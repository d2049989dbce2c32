"""Any order of arrivals, loads, cancels, pins and steps: the books always balance, and the queue always drains."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from flora.errors import OutOfPages, Overloaded
from flora.serve.engine.pages import Use
from flora.serve.engine.sequence import State
from tests.serve.engine.test_scheduler import Desk

SIZES = {"small": 1, "medium": 4, "large": 9}  # pages of each adapter
ADAPTERS = st.sampled_from([None, *SIZES])


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_pages=st.integers(6, 20),
        max_sequences=st.integers(1, 5),
        max_batch_tokens=st.integers(1, 30),
        num_slots=st.integers(1, 3),
    )
    def open(self, num_pages: int, max_sequences: int, max_batch_tokens: int, num_slots: int) -> None:
        self.desk = Desk(
            num_pages,
            max_sequences=max_sequences,
            max_batch_tokens=max_batch_tokens,
            num_slots=num_slots,
            max_waiting=6,
        )
        self.now_s = 0.0

    @rule(num_prompt=st.integers(1, 40), max_tokens=st.integers(1, 30), adapter=ADAPTERS)
    def submit(self, num_prompt: int, max_tokens: int, adapter: str | None) -> None:
        sequence = self.desk.sequence(
            str(self.desk.arrivals), num_prompt, max_tokens=max_tokens, adapter=adapter, at_s=self.now_s
        )
        try:
            self.desk.scheduler.submit(sequence)
        except (OutOfPages, Overloaded):
            assert self.desk.scheduler.get(sequence.key) is None

    @rule(adapter=st.sampled_from(list(SIZES)))
    def load(self, adapter: str) -> None:
        self.desk.packed[adapter] = SIZES[adapter]
        for sequence in self.desk.scheduler.waiting_for(adapter):
            try:
                self.desk.scheduler.room.check_sequence(sequence, SIZES[adapter])
            except OutOfPages:
                self.desk.scheduler.finish(sequence)

    @rule(adapter=st.sampled_from(list(SIZES)))
    def forget(self, adapter: str) -> None:
        """Host memory was wanted for something else."""
        self.desk.packed.pop(adapter, None)

    @rule(adapter=st.sampled_from(list(SIZES)))
    def pin(self, adapter: str) -> None:
        resident = self.desk.residency.get(adapter)
        if resident is None:
            return
        try:
            self.desk.scheduler.room.check_pin(adapter, len(resident.pages), self.desk.scheduler.live)
        except OutOfPages:
            return
        self.desk.residency.pin(adapter)

    @rule(adapter=st.sampled_from(list(SIZES)))
    def unload(self, adapter: str) -> None:
        if self.desk.residency.get(adapter):
            self.desk.residency.retire(adapter)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        live = self.desk.scheduler.of_client(b"")
        if live:
            self.desk.scheduler.finish(data.draw(st.sampled_from(live)))

    @rule(wait_s=st.sampled_from([0.0, 1.0, 6.0]))
    def step(self, wait_s: float) -> None:
        self.now_s += wait_s
        oldest = self.desk.scheduler.running[0] if self.desk.scheduler.running else None
        plan = self.desk.scheduler.plan(self.now_s)

        assert sum(chunk.count for chunk in plan.chunks) <= self.desk.scheduler.limits.max_batch_tokens
        assert len({chunk.sequence.key for chunk in plan.chunks}) == len(plan.chunks)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            assert sequence.state is State.RUNNING
            assert chunk.start == sequence.num_computed
            assert chunk.start + chunk.count <= len(sequence.pages) * 4  # every row has a slot
            if sequence.digest:
                assert self.desk.residency.get(sequence.digest).running > 0
        assert oldest is None or oldest.state is State.RUNNING, "the oldest running sequence is never preempted"
        self.desk.commit(plan)

    @invariant()
    def the_books_balance(self) -> None:
        if not hasattr(self, "desk"):
            return
        desk = self.desk
        running = desk.scheduler.running
        owned = [page for sequence in running for page in sequence.pages]
        owned += [page for resident in desk.residency for page in resident.pages]
        assert len(owned) == len(set(owned))
        assert desk.pages.num_free + len(owned) == desk.pages.num_usable
        assert desk.pages.count(Use.KV) == sum(len(sequence.pages) for sequence in running)
        assert [s.order for s in running] == sorted(s.order for s in running)
        assert len(running) <= desk.scheduler.limits.max_sequences
        for resident in desk.residency:
            assert resident.running == sum(sequence.digest == resident.digest for sequence in running)
        idle = [r for r in desk.residency if not r.running and not r.pinned]
        assert desk.residency.idle_pages == sum(len(resident.pages) for resident in idle)

    def teardown(self) -> None:
        """Every live request ends, whatever happened before, and then nothing is held but idle or pinned adapters."""
        if not hasattr(self, "desk"):
            return
        for adapter in SIZES:
            self.load(adapter)
        for _ in range(3000):
            if self.desk.scheduler.is_empty:
                break
            for adapter in SIZES:
                self.load(adapter)
            self.step(1.0)
            self.the_books_balance()
        assert self.desk.scheduler.is_empty, "the queue does not drain"
        assert self.desk.waiting == 0
        assert self.desk.pages.count(Use.KV) == 0
        assert not self.desk.scheduler.wanted_adapters()
        for resident in list(self.desk.residency):
            assert resident.running == 0
            self.desk.residency.retire(resident.digest)
        assert self.desk.pages.num_free == self.desk.pages.num_usable


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_random_requests_drain(seed):
    import random

    seeded = random.Random(seed)
    desk = Desk(num_pages=40, packed=SIZES, max_sequences=6, max_batch_tokens=16, max_waiting=2000)
    for number in range(1000):
        desk.submit(
            str(number),
            seeded.randrange(1, 50),
            max_tokens=seeded.randrange(1, 40),
            adapter=seeded.choice([None, *SIZES]),
        )

    for step in range(50_000):
        if desk.scheduler.is_empty:
            break
        desk.step(now_s=step * 0.01)

    assert desk.scheduler.is_empty
    assert desk.pages.count(Use.KV) == 0
    assert desk.pages.num_free + desk.pages.count(Use.ADAPTER) == desk.pages.num_usable
