"""Full checkpoints that take turns, beside adapters of one base: on the real engine, where time is a number."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flora.bench.asks import Ask
from flora.bench.cost import Checkpoints, drive_turns, measure_cost, tensors_of
from flora.bench.engines import World, make_world, running_engine
from flora.bench.facts import Surroundings
from flora.bench.in_process import drive_engine
from flora.bench.settings import ServeBench, Setting
from flora.bench.timeline import check_timelines
from flora.serve.config import EngineConfig
from flora.serve.engine import Engine
from tests.bench.clocks import SteppingClock
from tests.serve.engine.worlds import ask as ask_engine
from tests.serve.engine.worlds import run_to_end

TINY = Setting("tiny", "all", ranks=(4,), adapters=(2, 3), num_requests=9, lengths=(4, 9))
ENGINE = EngineConfig(
    base=Path(), registry="", cache_dir=Path(), pool_bytes=32 << 20, max_context=256, max_sequences=4, num_threads=1,
    prefix_cache=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("cost"), ServeBench(setting=TINY, engine=ENGINE), [])


@pytest.fixture
def engine(world: World) -> Iterator[Engine]:
    with running_engine(world.config([])) as engine:
        yield engine


def ask(due_s: float, checkpoint: int) -> Ask:
    return Ask(prompt=(10, 11, 12), num_tokens=4, due_s=due_s, adapter=checkpoint)


def test_who_waits_longest_names_the_next_checkpoint_and_all_of_his_are_served_with_him(engine):
    asks = [ask(0.0, 1), ask(0.0, 2), ask(0.0, 1), ask(0.0, 2), ask(0.001, 1)]
    loaded: list[int] = []

    turns = drive_turns(engine, asks, loaded.append, SteppingClock())

    check_timelines(asks, turns.seen.timelines)
    ends = [timeline.end_s or 0.0 for timeline in turns.seen.timelines]
    starts = [timeline.sent_s or 0.0 for timeline in turns.seen.timelines]
    assert loaded == [1, 2]
    assert max(ends[0], ends[2], ends[4]) <= min(starts[1], starts[3])


def test_a_checkpoint_that_is_there_is_not_loaded_again_and_nobody_is_served_before_he_asks(engine):
    asks = [ask(0.0, 1), ask(5.0, 1), ask(9.0, 2), ask(9.0, 1)]
    loaded: list[int] = []
    clock = SteppingClock()

    turns = drive_turns(engine, asks, loaded.append, clock)

    assert loaded == [1, 2, 1]
    assert len(turns.swap_s) == 3
    assert [round(moment_s - clock.slept[0], 0) for moment_s in clock.slept] == [0.0, 4.0]
    assert all((t.sent_s or 0) >= asked.due_s for asked, t in zip(asks, turns.seen.timelines, strict=True))


def test_a_checkpoint_comes_back_whole_and_in_place(engine):
    checkpoints = Checkpoints(engine)
    ask_engine(engine, "before", [5, 6, 7])
    before = run_to_end(engine)["before"].tokens
    places = list(tensors_of(engine.runner.model.weights))
    for place in places:
        place.zero_()
    ask_engine(engine, "gone", [5, 6, 7])
    assert run_to_end(engine)["gone"].tokens != before

    checkpoints.load(0)
    ask_engine(engine, "after", [5, 6, 7])

    assert run_to_end(engine)["after"].tokens == before
    assert all(now is then for now, then in zip(tensors_of(engine.runner.model.weights), places, strict=True))


def test_the_tensors_of_a_model_are_all_of_its_weights_once():
    class Holder:
        __module__ = "flora.somewhere"

        def __init__(self) -> None:
            self.weight, self.bias, self.name = torch.ones(2), None, "x"

    shared = torch.zeros(3)

    assert [len(tensor) for tensor in tensors_of((shared, [Holder(), {"a": shared}]))] == [3, 2]


def test_both_ways_answer_the_same_trace_and_say_what_they_fill(tmp_path):
    bench = ServeBench(setting=TINY, engine=ENGINE)

    rows = list(measure_cost(bench, Surroundings(commit="abc", gpu=None), scratch=tmp_path))

    assert [row.label for row in rows] == [f"cost/{w}/{n}" for n in (2, 3) for w in ("adapters", "checkpoints")]
    adapters, checkpoints = rows[2:]
    assert (adapters.out_tok, adapters.in_tok) == (checkpoints.out_tok, checkpoints.in_tok)
    assert (adapters.swaps, checkpoints.swaps) == (0, 3)
    assert adapters.gpu_s_per_m_tok == pytest.approx(1e6 * adapters.elapsed_s / adapters.out_tok, rel=1e-3)
    assert checkpoints.weights_gib_host == pytest.approx(3 * checkpoints.weights_gib_device, abs=1e-3)
    per_layer = 4 * (128 + 96 + 96 + 128 + 192 + 192 + 192)  # rank times inputs and outputs of the seven
    assert adapters.weights_gib_host == round(3 * 2 * per_layer * 4 / 2**30, 6)  # adapters, layers, bytes


def test_arrivals_are_served_in_both_ways_too(engine):
    asks = [replace(ask(0.01 * i, i % 2), adapter=i % 2) for i in range(6)]

    turns = drive_turns(engine, asks, lambda number: None, SteppingClock())
    alone = drive_engine(engine, [replace(asked, adapter=None) for asked in asks], {}, SteppingClock())

    check_timelines(asks, turns.seen.timelines)
    assert [t.num_tokens for t in turns.seen.timelines] == [t.num_tokens for t in alone.timelines]
