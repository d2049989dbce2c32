"""Fixed slots, which a unified pool is measured against: each has its pages for good, whoever lies there."""

from dataclasses import dataclass
from typing import Any

import pytest

from flora.bench.trace import Trace
from flora.errors import OutOfPages, UsageError
from flora.serve.engine.schedule.pages import Use
from flora.serve.engine.schedule.slots import pages_of_slot
from tests.serve.engine.adapters import random_adapter
from tests.serve.engine.desk import Desk
from tests.serve.engine.replay import trace_of
from tests.serve.engine.worlds import PAGE_BYTES, World, ask, run_to_end

PACKED = {"x": 2, "y": 3, "z": 4}


def fixed(num_pages: int = 20, *, num_slots: int = 2, slot_pages: int = 4, **settings: Any) -> Desk:
    return Desk(num_pages, num_slots=num_slots, slot_pages=slot_pages, **{"packed": PACKED} | settings)


def test_an_adapter_that_comes_or_goes_takes_and_frees_nothing():
    desk = fixed()
    assert (desk.pages.num_free, desk.pages.count(Use.ADAPTER)) == (12, 8)

    for name in ("x", "y", "z"):
        desk.residency.place(desk.sequence(name, 1, adapter=name).adapter, PACKED[name])
        assert (desk.pages.num_free, desk.residency.idle_pages, desk.residency.num_pages) == (12, 0, 8)

    assert {resident.digest for resident in desk.residency} == {"y", "z"}
    desk.residency.retire("y")
    assert (desk.pages.num_free, desk.residency.num_pages) == (12, 8)


def test_each_slot_keeps_its_pages_and_no_two_share_one():
    desk = fixed()
    lying = {name: desk.residency.place(desk.sequence(name, 1, adapter=name).adapter, 1).pages for name in ("x", "y")}
    assert not set(lying["x"]) & set(lying["y"])

    desk.residency.retire("x")
    z = desk.residency.place(desk.sequence("z", 1, adapter="z").adapter, 4)

    assert z.pages == lying["x"]


def test_idle_adapters_stay_when_keys_and_values_want_room():
    desk = fixed()
    desk.residency.place(desk.sequence("x", 1, adapter="x").adapter, 2)

    assert desk.scheduler.eviction.reclaimable == 12
    assert not desk.scheduler.eviction.reclaim(13)
    assert (len(desk.residency), desk.residency.num_evictions) == (1, 0)


def test_a_request_may_be_as_long_as_the_pages_that_no_slot_has_whatever_its_adapter():
    desk = fixed(10, num_slots=1)  # six pages of four tokens beside the slot
    desk.submit("a", 20, max_tokens=4, adapter="z")

    assert desk.step() == {"a": (0, 20)}
    for adapter in (None, "z"):
        with pytest.raises(OutOfPages, match="needs 7 pages of the pool and 6 can be had"):
            desk.submit("b", 24, max_tokens=4, adapter=adapter)


def test_a_request_waits_for_an_idle_slot_however_many_pages_are_free():
    desk = fixed(200, num_slots=1)
    desk.submit("a", 4, max_tokens=3, adapter="x")
    desk.submit("b", 4, max_tokens=3, adapter="y")
    desk.submit("c", 4, max_tokens=3)

    planned = [set(desk.step()) for _ in range(4)]

    assert planned == [{"a", "c"}, {"a", "c"}, {"a", "c"}, {"b"}]
    assert {resident.digest for resident in desk.residency} == {"y"}


@pytest.mark.parametrize("is_loaded", [True, False])
def test_an_adapter_larger_than_a_slot_is_refused_and_told_so(is_loaded):
    desk = fixed(packed={"large": 5} if is_loaded else {})
    words = "the adapter needs 5 pages of the pool and each slot has 4"

    if is_loaded:
        with pytest.raises(OutOfPages, match=words) as refused:
            desk.submit("a", 4, adapter="large")
    else:  # nobody knew its size when the request arrived
        sequence = desk.submit("a", 4, adapter="large")
        desk.load("large", 5)
        with pytest.raises(OutOfPages, match=words) as refused:
            desk.scheduler.room.check_sequence(sequence, 5)
    with pytest.raises(OutOfPages, match=words):
        desk.scheduler.room.check_adapter("large", 5)

    assert "larger slots" in str(refused.value.fix)
    assert not desk.residency.can_place(5)


def test_pins_cost_requests_no_page_and_leave_one_slot():
    desk = fixed(num_slots=2)
    desk.submit("a", 40, max_tokens=8)  # all twelve pages that there are
    desk.scheduler.room.check_pin("x", 2, desk.scheduler.live)
    desk.residency.place(desk.sequence("x", 1, adapter="x").adapter, 2)
    desk.residency.pin("x")

    assert desk.residency.pinned_pages == 0
    desk.scheduler.room.check_adapter("y", 4)
    with pytest.raises(OutOfPages, match="2 of 2 adapter slots"):
        desk.scheduler.room.check_pin("y", 3, desk.scheduler.live)


@dataclass
class Played:
    desk: Desk
    most_kv: int = 0
    most_running: int = 0
    steps: int = 0


def play(trace: Trace, desk: Desk) -> Played:
    """All requests at once, to their end; the desk checks each token."""
    done = Played(desk)
    for number, adapter in enumerate(trace.adapters):
        desk.submit(
            str(number), trace.prompts[number], max_tokens=int(trace.output_lens[number]), adapter=f"a{adapter}"
        )
    while not desk.scheduler.is_empty:
        assert done.steps < 10_000, "the queue does not drain"
        desk.step(now_s=done.steps * 0.05)
        done.steps += 1
        done.most_kv = max(done.most_kv, desk.pages.count(Use.KV))
        done.most_running = max(done.most_running, len(desk.scheduler.running))
    return done


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_keys_and_values_have_what_the_slots_leave_and_one_pool_serves_more_at_once(prefix_cache):
    """True sizes 1, 2, 4, 8; slots of 8. 60 pages: six slots leave 12, one pool all that the adapters do not need."""
    trace = trace_of(num_requests=150, num_adapters=12, alpha=0.8)
    settings = {"max_sequences": 32, "max_waiting": 200, "max_batch_tokens": 64, "prefix_cache": prefix_cache}
    true = {f"a{number}": 2 ** (number % 4) for number in range(12)}

    unified = play(trace, Desk(60, packed=true, num_slots=12, **settings))
    slots = play(trace, Desk(60, packed=dict.fromkeys(true, 8), num_slots=6, slot_pages=8, **settings))

    assert slots.most_kv == 12 < unified.most_kv
    assert slots.most_running < unified.most_running
    assert slots.steps > 1.5 * unified.steps
    assert slots.desk.pages.count(Use.ADAPTER) == 48
    assert slots.desk.pages.num_free == 12 - slots.desk.prefixes.idle_pages


@pytest.mark.parametrize(
    ("slot_bytes", "num_slots", "pages"), [(None, 9, None), (1, 9, 1), (100, 9, 1), (101, 4, 2), (900, 1, 9)]
)
def test_a_slot_is_whole_pages(slot_bytes, num_slots, pages):
    assert pages_of_slot(slot_bytes, num_slots, num_pages=11, page_bytes=100) == pages


@pytest.mark.parametrize(("slot_bytes", "num_slots", "most"), [(901, 1, 0), (201, 4, 3), (100, 10, 9)])
def test_slots_that_leave_no_page_are_refused_with_how_many_fit(slot_bytes, num_slots, most):
    with pytest.raises(
        UsageError, match=f"{num_slots} slots of {slot_bytes} bytes do not fit into a pool of 1100"
    ) as e:
        pages_of_slot(slot_bytes, num_slots, num_pages=11, page_bytes=100)

    assert f"at most {most} slots" in str(e.value.fix)


def test_an_engine_is_not_built_around_slots_that_do_not_fit(world: World):
    slots = {"pool_bytes": 40 * PAGE_BYTES, "max_adapters": 4, "slot_bytes": 10 * PAGE_BYTES}

    with pytest.raises(UsageError, match="4 slots of 81920 bytes do not fit into a pool of 327680 bytes") as refused:
        world.engine(**slots)
    assert "each takes 10 pages of 8192 bytes, together 40; the pool has 39" in str(refused.value.cause)
    assert "at most 3 slots" in str(refused.value.fix)

    with pytest.raises(UsageError, match="a context of 200 tokens is more than the pool holds: 144"):
        world.engine(**slots | {"max_adapters": 3, "max_context": 200})  # 39 pages without 30 are 9 of 16 tokens


def test_an_engine_of_fixed_slots_tells_what_one_pool_tells(world: World):
    targets = [world.add(random_adapter(world.config, seed=seed, ranks=[2, 4]), f"a{seed}") for seed in (1, 2, 3)]
    answers = []
    for settings in ({}, {"pool_bytes": 60 * PAGE_BYTES, "max_adapters": 2, "slot_bytes": 20 * PAGE_BYTES}):
        engine = world.engine(**settings)
        for number in range(6):
            ask(engine, str(number), [5, 6, 7 + number], targets[number % 3])
        answers.append({name: answer.tokens for name, answer in run_to_end(engine).items()})
        beat = engine.heartbeat()
        engine.close()

    assert answers[0] == answers[1]
    assert all(len(tokens) == 12 for tokens in answers[0].values())
    assert (beat.adapter_pages, beat.free_pages, beat.kv_pages, len(beat.resident)) == (40, 19, 0, 2)
    assert beat.adapter_evictions > 0
