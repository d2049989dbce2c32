"""Any order of arrivals, loads, cancels, pins and steps: the books always balance, and the queue always drains."""

import random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from flora.errors import OutOfPages, Overloaded
from flora.serve.engine.schedule.pages import Use
from flora.serve.engine.schedule.prefix import PrefixPage
from flora.serve.engine.schedule.sequence import PENDING, State
from tests.conftest import examples
from tests.serve.engine.desk import PAGE_TOKENS, Desk

SIZES = {"small": 1, "medium": 4, "large": 9}  # pages of each adapter
ADAPTERS = st.sampled_from([None, *SIZES])
# Few beginnings, so that prompts share pages, and part within one.
PROMPTS = st.tuples(st.sampled_from([0, 5, 14, 30]), st.lists(st.integers(0, 1), min_size=1, max_size=12)).map(
    lambda parts: (0, 1) * parts[0] + tuple(parts[1])
)


def cached_pages(desk: Desk) -> list[PrefixPage]:
    """Every page of the prefix cache: those that a request can find, and those that are only held to their end."""
    found = {page for sequence in desk.scheduler.running for page in sequence.prefix}
    behind = list(desk.prefixes._roots.values())
    while behind:
        children = behind.pop().children.values()
        found |= set(children)
        behind += children
    return list(found)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_pages=st.integers(6, 20),
        max_sequences=st.integers(1, 5),
        max_batch_tokens=st.integers(1, 30),
        num_slots=st.integers(1, 3),
        slot_pages=st.sampled_from([None, None, 4, 9]),
        overlaps=st.booleans(),
        policy=st.fixed_dictionaries(
            {
                "prefix_cache": st.booleans(),
                "fairness": st.booleans(),
                "prefetch": st.booleans(),
                "slo_ttft_s": st.sampled_from([None, None, 4.0]),
                "cluster": st.sampled_from([None, 1, 2]),
            }
        ),
    )
    def open(
        self, num_pages: int, num_slots: int, slot_pages: int | None, policy: dict[str, Any], **limits: Any
    ) -> None:
        """num_pages  for requests: those of slots that are set aside come on top"""
        num_pages += num_slots * (slot_pages or 0)
        self.desk = Desk(num_pages, num_slots=num_slots, slot_pages=slot_pages, max_waiting=6, **limits, **policy)
        self.now_s = 0.0

    @rule(prompt=PROMPTS, max_tokens=st.integers(1, 30), adapter=ADAPTERS)
    def submit(self, prompt: tuple[int, ...], max_tokens: int, adapter: str | None) -> None:
        sequence = self.desk.sequence(
            str(self.desk.arrivals), prompt, max_tokens=max_tokens, adapter=adapter, at_s=self.now_s
        )
        try:
            self.desk.scheduler.submit(sequence)
        except (OutOfPages, Overloaded):
            assert self.desk.scheduler.get(sequence.key) is None

    @rule(adapter=st.sampled_from(list(SIZES)))
    def load(self, adapter: str) -> None:
        self.desk.load(adapter, SIZES[adapter])
        for sequence in self.desk.scheduler.waiting_for(adapter):
            try:
                self.desk.scheduler.room.check_sequence(sequence, SIZES[adapter])
            except OutOfPages:
                self.desk.scheduler.finish(sequence)

    @rule(adapter=st.sampled_from(list(SIZES)))
    def forget(self, adapter: str) -> None:
        """Host memory was wanted for something else."""
        self.desk.packed.pop(adapter, None)
        self.desk.scheduler.adapter_left(adapter)

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
        self.desk.prefixes.forget(adapter)
        self.desk.scheduler.adapter_left(adapter)

    @rule(data=st.data(), is_sound=st.booleans())
    def end(self, data: st.DataObject, is_sound: bool) -> None:
        """A cancel, or an answer that is not finite."""
        live = self.desk.scheduler.of_client(b"")
        if live:
            self.desk.scheduler.finish(data.draw(st.sampled_from(live)), is_sound=is_sound)

    @rule(wait_s=st.sampled_from([0.0, 1.0, 6.0]))
    def step(self, wait_s: float) -> None:
        self.now_s += wait_s
        for sequence in self.desk.scheduler.late(self.now_s):
            assert self.desk.scheduler.policy.slo_ttft_s
            self.desk.scheduler.finish(sequence)
        oldest = self.desk.scheduler.running[0] if self.desk.scheduler.running else None
        plan = self.desk.scheduler.plan(self.now_s)

        assert sum(chunk.count for chunk in plan.chunks) <= self.desk.scheduler.limits.max_batch_tokens
        assert len({chunk.sequence.key for chunk in plan.chunks}) == len(plan.chunks)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            assert sequence.state is State.RUNNING
            assert chunk.start == sequence.num_computed
            assert chunk.start + chunk.count <= len(sequence.pages) * PAGE_TOKENS  # every row has a slot
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
        cached = cached_pages(desk)
        shared = [page.page for page in cached]
        private = [page for sequence in running for page in sequence.pages if page not in shared]
        owned = shared + private + [page for resident in desk.residency for page in resident.pages]
        assert len(owned) == len(set(owned)), "no page has two owners, unless it is the cache's"
        assert desk.pages.num_free + len(shared) + len(private) + desk.residency.num_pages == desk.pages.num_usable
        assert desk.pages.count(Use.ADAPTER) == desk.residency.num_pages
        assert desk.pages.count(Use.KV) == len(shared) + len(private)
        for page in cached:
            assert page.holders == sum(page in sequence.prefix for sequence in running)
            assert page.is_listed or page.holders
            assert PENDING not in page.tokens
            if page.parent and page.parent.parent and page.parent.is_listed and not page.parent.holders:
                assert not page.holders
                assert page.due < page.parent.due, "what continues a page leaves before it"
        assert desk.prefixes.idle_pages == sum(not page.holders for page in cached)
        assert not cached or desk.scheduler.policy.prefix_cache
        for sequence in running:
            assert len(sequence.pages) * PAGE_TOKENS >= sequence.num_computed
            for place, page in enumerate(sequence.prefix):
                tokens = tuple(sequence.tokens[place * PAGE_TOKENS : (place + 1) * PAGE_TOKENS])
                assert (page.digest, page.tokens) == (sequence.digest, tokens)
        assert [s.order for s in running] == sorted(s.order for s in running)
        assert len(running) <= desk.scheduler.limits.max_sequences
        for resident in desk.residency:
            assert resident.running == sum(sequence.digest == resident.digest for sequence in running)
        idle = [r for r in desk.residency if not r.running and not r.pinned]
        can_go = 0 if desk.residency.slots.are_fixed else sum(len(resident.pages) for resident in idle)
        assert desk.residency.idle_pages == can_go

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
        assert self.desk.pages.count(Use.KV) == self.desk.prefixes.idle_pages
        assert not list(self.desk.scheduler.wanted_adapters())
        for resident in list(self.desk.residency):
            assert resident.running == 0
            self.desk.residency.retire(resident.digest)
        num_shared = self.desk.residency.slots.num_shared  # all, but for slots that are set aside
        assert self.desk.scheduler.eviction.reclaim(num_shared)
        assert not cached_pages(self.desk)
        assert self.desk.pages.num_free == num_shared


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=examples(60), stateful_step_count=50)


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("policy", [{}, {"prefix_cache": True, "fairness": True, "cluster": 2}])
def test_a_thousand_random_requests_drain(policy, overlaps):
    """The desk checks every token against what the request is told alone."""
    seeded = random.Random(1)
    desk = Desk(40, packed=SIZES, max_sequences=6, max_batch_tokens=16, max_waiting=2000, overlaps=overlaps, **policy)
    for number in range(1000):
        prompt = (0, 1) * seeded.choice([0, 7, 15]) + tuple(seeded.randrange(2) for _ in range(seeded.randrange(1, 20)))
        desk.submit(str(number), prompt, max_tokens=seeded.randrange(1, 40), adapter=seeded.choice([None, *SIZES]))

    for step in range(50_000):
        if desk.scheduler.is_empty:
            break
        desk.step(now_s=step * 0.01)

    assert desk.scheduler.is_empty
    assert (desk.scheduler.num_cached_tokens > 0) == bool(policy)
    assert desk.pages.count(Use.KV) == desk.prefixes.idle_pages
    assert desk.scheduler.eviction.reclaim(desk.pages.num_usable)
