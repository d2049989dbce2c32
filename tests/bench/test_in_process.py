"""The engine under measurement is the real one, on a CPU, with a base and adapters drawn at random."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from flora.bench.asks import Ask
from flora.bench.engines import World, host_cache_bytes, make_world, running_engine
from flora.bench.facts import Surroundings
from flora.bench.in_process import drive_engine
from flora.bench.merged import drive_merged, merged_turns
from flora.bench.serving import check_nothing_leaks, measure_engine
from flora.bench.settings import ServeBench, Setting
from flora.bench.summary import summarize
from flora.bench.timeline import check_timelines
from flora.bench.workload import all_numbers, asks_for, trace_of
from flora.errors import CheckFailed
from flora.serve.config import EngineConfig
from flora.serve.engine import Engine
from flora.serve.engine.pool import DevicePool
from flora.serve.engine.schedule.pages import Use
from tests.bench.clocks import SteppingClock

TINY = Setting("tiny", "attention", ranks=(8, 4), adapters=(0, 3), num_requests=12, lengths=(4, 16))
ENGINE = EngineConfig(base=Path(), registry="", cache_dir=Path(), pool_bytes=32 << 20, max_sequences=8, num_threads=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    bench = ServeBench(setting=TINY, engine=ENGINE)
    return make_world(tmp_path_factory.mktemp("bench"), bench, range(4))


@pytest.fixture
def engine(world: World) -> Iterator[Engine]:
    with running_engine(world.config(range(4))) as engine:
        yield engine


def ask(due_s: float, *, num_tokens: int = 4, adapter: int | None = None, cancel_after: int | None = None) -> Ask:
    return Ask(prompt=(10, 11, 12), num_tokens=num_tokens, due_s=due_s, adapter=adapter, cancel_after=cancel_after)


def test_a_request_is_submitted_when_it_is_due_and_the_loop_sleeps_until_then(world, engine):
    asks = [ask(0.5, adapter=0), ask(0.502), ask(7.0, adapter=1)]
    clock = SteppingClock()

    seen = drive_engine(engine, asks, world.targets, clock)

    check_timelines(asks, seen.timelines)
    for asked, timeline in zip(asks, seen.timelines, strict=True):
        assert timeline.sent_s is not None
        assert timeline.first_s is not None
        assert asked.due_s <= timeline.sent_s < timeline.first_s
        assert timeline.sent_s - asked.due_s < 0.05
    # twice there is nothing to do: before the first request, and between the second and the third
    assert [round(moment_s - clock.slept[0], 1) for moment_s in clock.slept] == [0.0, 6.5]


def test_a_benchmark_asks_every_request_to_be_drawn_as_it_is_told():
    bench = ServeBench(setting=TINY, engine=ENGINE, temperature=0.7, top_p=0.9)

    asks = asks_for(bench, trace_of(bench, 3, seed=42), 3, seed=42)

    assert {(asked.temperature, asked.top_p) for asked in asks} == {(0.7, 0.9)}


def test_requests_are_drawn_as_they_ask_each_with_a_seed_of_its_own(world, engine, monkeypatch):
    submit, asked = engine.submit, []
    monkeypatch.setattr(engine, "submit", lambda message: (asked.append(message.sampling), submit(message)))
    asks = [replace(ask(0.0), temperature=0.7, top_p=0.9), replace(ask(0.0), temperature=0.7), ask(0.0)]

    check_timelines(asks, drive_engine(engine, asks, world.targets).timelines)

    assert [(each.temperature, each.top_p, each.seed) for each in asked] == [
        (0.7, 0.9, 0),
        (0.7, 1.0, 1),
        (0.0, 1.0, 2),
    ]


def test_requests_that_are_there_at_once_are_all_sent_before_the_first_step(world, engine):
    asks = [ask(0.0, adapter=i % 4) for i in range(12)]

    cold, warm = drive_engine(engine, asks, world.targets), drive_engine(engine, asks, world.targets)

    for seen in (cold, warm):
        check_timelines(asks, seen.timelines)
        assert max(timeline.sent_s or 0 for timeline in seen.timelines) <= min(t.first_s or 0 for t in seen.timelines)
    assert (cold.counts["loads"], warm.counts["loads"]) == (4, 0)
    assert warm.full_batch_after_s is not None  # 12 requests for 8 places, and nobody waits for an adapter


def test_a_client_that_goes_away_midway_leaves_no_page_behind(world, engine):
    asks = [ask(0.0, num_tokens=30, adapter=i % 3, cancel_after=5 if i % 2 else None) for i in range(12)]

    seen = drive_engine(engine, asks, world.targets)

    check_timelines(asks, seen.timelines)
    assert [timeline.outcome for timeline in seen.timelines[:2]] == ["length", "cancelled"]
    assert check_nothing_leaks(engine) == 0


def test_a_page_that_nobody_gives_back_fails_the_check(engine):
    engine.pages.allocate(1, Use.KV)

    with pytest.raises(CheckFailed, match="holds 1 pages"):
        check_nothing_leaks(engine)


def test_a_request_that_the_engine_refuses_is_no_figure(world, engine):
    too_long = Ask(prompt=(10,) * 9000, num_tokens=4, due_s=0.0, adapter=None)

    seen = drive_engine(engine, [too_long, ask(0.0)], world.targets)

    assert [timeline.outcome for timeline in seen.timelines] == ["failed", "length"]
    with pytest.raises(CheckFailed):
        check_timelines([too_long, ask(0.0)], seen.timelines)


def test_each_number_of_adapters_and_each_seed_make_a_row(tmp_path):
    bench = ServeBench(setting=TINY, engine=ENGINE, seeds=(42, 42), rate=200.0, cv=2.0, cancel=0.2)

    rows = []
    gc.disable()  # what is not given back by the code stays
    for row in measure_engine(bench, Surroundings(commit="abc", gpu=None), scratch=tmp_path):
        rows.append(row)
        gc.unfreeze()  # what is frozen is not told
        pools = sum(type(thing) is DevicePool for thing in gc.get_objects())
        assert pools == 1, "two do not fit on a GPU"
    gc.enable()

    assert [(row.adapters, row.order) for row in rows] == [(0, "cold"), (0, "warm"), (3, "cold"), (3, "warm")]
    assert all(row.completed + row.cancelled == row.requests == 12 for row in rows)
    assert all(row.cancelled > 0 and row.kv_pages_left == 0 for row in rows)
    cold, warm = rows[2:]
    assert (cold.loads, warm.loads) == (cold.distinct, 0)
    assert set(cold.kernels or {}) >= {"lora_shrink", "lora_expand", "paged_attention"}
    assert cold.completed / cold.req_s == pytest.approx(cold.elapsed_s, abs=0.006)  # which is rounded to 10 ms
    assert not list(tmp_path.iterdir()), "no folder is left behind"


def test_warm_up_adapters_are_none_of_those_that_are_measured():
    bench = ServeBench(setting=TINY, engine=ENGINE)

    assert {number for number in all_numbers(bench) if number >= 3} <= set(range(3, 11))
    assert {0, 1, 2} <= all_numbers(bench)


def test_the_host_cache_is_no_larger_than_the_adapters_can_fill():
    g1 = Setting("llama3-8b", "attention", ranks=(64, 32, 16, 8), adapters=(1000,))
    config = EngineConfig(base=Path(), registry="", cache_dir=Path(), dtype="bfloat16", host_cache_bytes=28 << 30)
    of_four = (64 + 32 + 16 + 8) * 26_624 * 32 * 2  # bytes: ranks, inputs and outputs of q, k, v, o, layers, bf16

    assert host_cache_bytes(config, g1, range(5)) == 3 << 29
    assert host_cache_bytes(config, g1, range(100)) == pytest.approx(1.25 * 25 * of_four, abs=1)
    assert host_cache_bytes(config, g1, range(1000)) == 28 << 30


def test_merged_adapters_are_served_one_after_the_other_by_the_bases_weights(engine):
    asks = [ask(0.0, adapter=i % 3) for i in range(9)]

    seen = drive_merged(engine, asks)

    check_timelines(asks, seen.timelines)
    spans = [
        (min(t.sent_s or 0 for t in of_one), max(t.end_s or 0 for t in of_one))
        for of_one in (seen.timelines[i::3] for i in range(3))
    ]
    assert spans[0][1] <= spans[1][0] < spans[1][1] <= spans[2][0]
    assert (seen.counts["loads"], seen.counts["evictions"]) == (0, 0)
    assert seen.counts["steps"] >= 3 * 4


def test_turns_of_merged_adapters_are_all_that_one_has_or_what_s_loras_queue_takes():
    """Five prompts of 3 tokens for each of two adapters, alternating, and 40 of a third at the end."""
    asks = [ask(0.0, adapter=i % 2) for i in range(10)] + [ask(0.0, adapter=2) for _ in range(40)]

    def turns(tokens: int | None) -> list[tuple[int, int]]:
        return [(asks[taken[0]].adapter, len(taken)) for taken in merged_turns(asks, tokens)]

    assert turns(None) == [(0, 5), (1, 5), (2, 40)]
    # no request has more than 30 of others before it, so a turn goes on until its adapter has none
    assert turns(8) == [(0, 5), (1, 5), (2, 40)]
    # behind those forty it has too many before it, though one of the two still fits into a batch that was begun
    asks += [ask(0.0, adapter=0), ask(0.0, adapter=0)]
    assert turns(8) == [(0, 6), (1, 5), (2, 40), (0, 1)]
    assert turns(1) == [(0, 5), (1, 5), (2, 40), (0, 2)]  # a prompt that is longer than a batch is a batch
    assert turns(None) == [(0, 7), (1, 5), (2, 40)]
    assert sorted(i for taken in merged_turns(asks, 8) for i in taken) == list(range(52))


def test_fixed_slots_hold_adapters_of_the_largest_rank_and_their_pages_are_nobody_elses(tmp_path):
    world = make_world(tmp_path, ServeBench(setting=replace(TINY, fixed_slots=2), engine=ENGINE), range(4))
    asks = [ask(0.0, adapter=i % 4) for i in range(8)]

    with running_engine(world.config(range(4))) as engine:
        seen = drive_engine(engine, asks, world.targets)
        beat, largest = engine.heartbeat(), engine.host.num_pages(world.targets[0].serving_digest)
        check_nothing_leaks(engine)
        engine.forget()
        check_nothing_leaks(engine)
        emptied = engine.heartbeat()

    check_timelines(asks, seen.timelines)
    # the setting's ranks are 8 and 4
    assert [(adapter.rank, adapter.num_pages) for adapter in beat.resident] == [(8, largest), (8, largest)]
    assert beat.adapter_pages == emptied.adapter_pages == 2 * largest
    assert beat.free_pages == emptied.free_pages
    assert seen.counts["evictions"] >= 2


def test_requests_that_the_engine_gives_up_are_counted_and_have_not_met_their_objective(world):
    """No first token comes in a nanosecond, so early abort refuses everybody."""
    bench = ServeBench(setting=TINY, engine=msgspec.structs.replace(ENGINE, slo_ttft_s=1e-9))
    asks = [ask(0.0, adapter=i % 3) for i in range(6)]

    with running_engine(replace(world, bench=bench).config(range(4))) as engine:
        seen = drive_engine(engine, asks, world.targets)

    check_timelines(asks, seen.timelines, may_abort=True)
    figures = summarize(asks, seen.timelines, slo_ttft_s=6.0)
    assert (figures["aborted"], figures["completed"], figures["slo_attainment"]) == (6, 0, 0.0)
    assert (figures["ttft_ms_p50"], figures["tpot_ms_p50"], figures["req_s"]) == (None, None, 0.0)
