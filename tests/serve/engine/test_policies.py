"""What each switch of the scheduler changes: seeded traces of S-LoRA's generator, the same with it and without."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from flora.bench.trace import Trace, Workload, draw_trace
from flora.serve.engine.schedule.policy import Policy
from flora.serve.engine.schedule.sequence import State
from tests.serve.engine.desk import Desk, names
from tests.serve.engine.replay import STEP_S, Replay, replay, trace_of
from tests.serve.engine.worlds import ask, run_to_end


def test_without_any_switch_who_comes_first_goes_first():
    done = replay(trace_of(num_requests=60, num_adapters=5, rate=20.0))

    assert done.admitted == done.sequences


# --- fairness ---


def test_fairness_keeps_a_popular_adapter_from_holding_up_the_others():
    """Three quarters of all requests want adapter 0, and come faster than they are served."""
    trace = trace_of(num_requests=300, num_adapters=10, alpha=0.125, rate=40.0)
    assert 200 < sum(trace.adapters == 0) < 240

    first_come, fair = replay(trace, max_sequences=4), replay(trace, max_sequences=4, fairness=True)

    rare = [f"a{number}" for number in range(3, 10)]
    waits = {name: (first_come.wait_s(name), fair.wait_s(name)) for name in rare}
    assert all(fair_s < 0.5 * plain_s for plain_s, fair_s in waits.values()), waits
    assert fair.wait_s("a0") < 1.3 * first_come.wait_s("a0")
    assert fair.end_s < 1.05 * first_come.end_s  # who is served changes, not how much


@pytest.mark.parametrize(("num_prompt", "max_tokens"), [(60, 10), (10, 30)], ids=["long prompts", "long answers"])
def test_adapters_that_always_wait_are_served_alike(num_prompt, max_tokens):
    """The bound of virtual token counters (arXiv:2401.00588, section 4): twice what a batch can be worth. Requests for
    the one are larger, and come before all of the other's.
    """
    desk = Desk(packed={"large": 1, "small": 1}, max_sequences=2, max_waiting=400, fairness=True)
    sizes = {"large": (num_prompt, max_tokens), "small": (10, 10)}
    sequences = [
        desk.submit(f"{name}{i}", size[0], max_tokens=size[1], adapter=name)
        for name, size in sizes.items()
        for i in range(200)
    ]
    batch = 2 * (num_prompt + 2 * max_tokens)
    served = dict.fromkeys(sizes, 0)

    while min(served.values()) < 20 * batch:
        desk.step()
        for name, (prompt, _) in sizes.items():
            started = [s for s in sequences if s.digest == name and s.state is not State.WAITING]
            served[name] = sum(prompt + 2 * sequence.num_generated for sequence in started)
        assert abs(served["large"] - served["small"]) <= 2 * batch
    assert all(desk.scheduler.waiting_for(name) for name in sizes)


def test_an_adapter_that_comes_back_has_saved_no_credit():
    desk = Desk(packed={"x": 1, "y": 1}, max_sequences=1, fairness=True)
    for i in range(4):
        desk.submit(f"x{i}", 4, max_tokens=4, adapter="x")
    for _ in range(8):
        desk.step()
    desk.submit("y0", 4, max_tokens=4, adapter="y")  # now it is as far as x, not a hundred tokens behind
    desk.submit("y1", 4, max_tokens=4, adapter="y")
    order = []
    while not desk.scheduler.is_empty:
        order += [name for name, (start, _) in desk.step().items() if start == 0]

    assert order == ["x2", "y0", "x3", "y1"]


@pytest.mark.parametrize(("max_wait_s", "longest_s"), [(1.0, 1.5), (1000.0, 8.0)])
def test_no_adapter_waits_for_its_turn_longer_than_the_age_cap(max_wait_s, longest_s):
    """Every moment adapters come that were served less than the one that waits."""
    desk = Desk(max_sequences=1, fairness=True, max_wait_s=max_wait_s, num_slots=4, max_waiting=1000)
    desk.packed.update({f"new{i}": 1 for i in range(400)} | {"old": 1})
    desk.submit("0", 40, max_tokens=20, adapter="old")
    for i in range(4):
        desk.submit(f"first{i}", 4, max_tokens=2, adapter=f"new{i}")
    waits = desk.submit("1", 4, max_tokens=2, adapter="old")
    step = 0
    while waits.state is State.WAITING:
        if step < 160 and step % 2 == 0:
            desk.submit(f"new{4 + step}", 4, max_tokens=2, adapter=f"new{4 + step}", at_s=step * STEP_S)
        desk.step(now_s=step * STEP_S)
        step += 1

    assert (step * STEP_S <= longest_s) == (max_wait_s < longest_s)


# --- early abort ---


def overload(cv: float) -> Trace:
    return trace_of(num_requests=400, num_adapters=20, rate=30.0, cv=cv)


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_early_abort_serves_more_requests_in_time(cv):
    """S-LoRA's figure 10: under overload first come, first served answers hardly anyone in time."""
    plain = replay(overload(cv), max_sequences=4)
    aborting = replay(overload(cv), max_sequences=4, slo_ttft_s=2.0)

    assert not plain.refused
    assert plain.attainment(2.0) < 0.3
    assert aborting.attainment(2.0) > 2 * plain.attainment(2.0)
    assert aborting.attainment(2.0) > 0.9 * len(aborting.first_token_s) / 400  # who is admitted is in time
    assert len(aborting.refused) + len(aborting.first_token_s) == 400


def test_under_overload_the_newest_go_first():
    """Who came last has the most time left, and who came first is about to have none."""
    aborting = replay(overload(1.0), max_sequences=4, slo_ttft_s=2.0)
    calm = replay(trace_of(num_requests=60, num_adapters=5, rate=2.0), max_sequences=4, slo_ttft_s=2.0)

    def overtakings(done: Replay) -> int:
        orders = [sequence.order for sequence in done.admitted]
        return sum(later < earlier for earlier, later in pairwise(orders))

    assert overtakings(aborting) > 0.2 * len(aborting.admitted)
    assert overtakings(calm) <= 2


def test_while_all_are_admitted_who_comes_first_goes_first():
    """One arrives each second and is admitted at once: no more than can be. Then two come in one moment."""
    desk = Desk(slo_ttft_s=6.0, max_sequences=1)
    for second in range(21):
        desk.submit(f"at {second}", 4, max_tokens=1, at_s=float(second))
        serve(desk, now_s=float(second))
    older, newer = (desk.submit(name, 4, max_tokens=4, at_s=20.1) for name in ("older", "newer"))

    serve(desk, now_s=20.1)

    assert (older.state, newer.state) == (State.RUNNING, State.WAITING)


def test_early_abort_refuses_nobody_who_can_be_served_in_time():
    trace = trace_of(num_requests=200, num_adapters=20, rate=2.0)

    done = replay(trace, max_sequences=4, slo_ttft_s=2.0)

    assert not done.refused
    assert done.attainment(2.0) == 1.0


def test_who_has_had_a_token_is_never_aborted():
    """A preempted request waits again, and its client has read the beginning of its answer."""
    desk = Desk(num_pages=8, slo_ttft_s=1.0)
    desk.submit("old", (0,) * 4, max_tokens=20)
    young = desk.submit("young", (1,) * 9, max_tokens=12)
    while not desk.scheduler.num_preemptions:
        desk.step()

    assert young.state is State.WAITING
    assert desk.scheduler.late(now_s=100.0) == []


def serve(desk: Desk, now_s: float) -> list[str]:
    """A step as the engine makes it; the names of those that it refuses."""
    late = desk.scheduler.late(now_s)
    for sequence in late:
        desk.scheduler.finish(sequence)
    desk.step(now_s)
    return names(late)


def after_a_prefill_of_21_s(**settings: Any) -> Desk:
    """At second 21 an empty desk, where nobody has a first token later than two seconds after his arrival."""
    desk = Desk(slo_ttft_s=2.0, **settings)
    desk.submit("slow", 4, max_tokens=1)
    for now_s in (0.0, 21.0):
        assert serve(desk, now_s) == []
    assert desk.scheduler.is_empty
    return desk


def test_an_idle_engine_refuses_nobody_however_long_the_last_prefill_took():
    desk = after_a_prefill_of_21_s()

    assert serve(desk, now_s=21.05) == []
    at_s = 21.1
    desk.submit("next", 4, max_tokens=1, at_s=at_s)
    assert serve(desk, at_s) == []
    assert desk.scheduler.is_empty


def test_one_slow_prefill_refuses_others_for_seconds_and_not_for_as_long_as_a_stream_runs():
    """6.3 s are estimated for a prefill, 0.7 times that after each second without one, and 2 s are promised."""
    desk = after_a_prefill_of_21_s(num_pages=1000)
    desk.submit("stream", 4, max_tokens=1000, at_s=21.0)
    refused = {}
    for step in range(1, 200):
        now_s = 21.0 + step * STEP_S
        desk.submit(f"at {now_s}", 4, max_tokens=1, at_s=now_s)
        refused[now_s] = bool(serve(desk, now_s))

    assert any(refused.values())
    assert max(now_s for now_s, is_refused in refused.items() if is_refused) < 21.0 + 5.0
    assert desk.scheduler.get((b"", "stream"))


def test_what_a_preempted_request_waits_for_its_return_is_no_part_of_its_prefill():
    desk = Desk(num_pages=8, max_batch_tokens=2, slo_ttft_s=10.0)
    desk.submit("old", (0,) * 4, max_tokens=20)
    young = desk.submit("young", (1,) * 18, max_tokens=12)
    while not desk.scheduler.num_preemptions:
        serve(desk, now_s=0.0)
    assert (young.num_generated, young.state) == (0, State.WAITING)

    now_s = 100.0  # old was slow
    while not young.num_generated:
        serve(desk, now_s)
        now_s += STEP_S
    assert young.state is State.RUNNING
    desk.submit("next", 4, max_tokens=1, at_s=now_s)
    assert [serve(desk, now_s + step * STEP_S) for step in range(4)] == [[]] * 4


def rush(desk: Desk, now_s: float, **newcomer: int) -> None:
    """A step to which two newcomers come: more than are admitted."""
    for _ in range(2):
        desk.submit(f"newcomer {desk.arrivals}", at_s=now_s, **newcomer)
    serve(desk, now_s)


def seconds_until(desk: Desk, now_s: float, is_so: Callable[[], bool], **newcomer: int) -> float:
    """How long the rush goes on until it is so; 20 s if it is not so by then."""
    begin_s = now_s
    while not is_so() and now_s < begin_s + 20.0:
        rush(desk, now_s, **newcomer)
        now_s += STEP_S
    return now_s - begin_s


def test_under_overload_a_preempted_request_goes_before_newcomers_though_an_older_one_waits():
    """Of 12 pages `large` needs 10: it never finds them. `young` is preempted by `old`, which ends 22 steps later."""
    desk = Desk(num_pages=12, max_sequences=2, max_waiting=10_000, slo_ttft_s=1000.0, max_wait_s=1000.0)
    desk.submit("old", 8, max_tokens=40)
    desk.step()
    desk.submit("large", 40, max_tokens=2)
    young = desk.submit("young", 8, max_tokens=40)
    before_s = seconds_until(desk, 0.0, lambda: desk.scheduler.num_preemptions > 0, prompt=3, max_tokens=1)
    assert (young.state, young.num_generated) == (State.WAITING, 16)

    back_s = seconds_until(desk, before_s, lambda: young.state is State.RUNNING, prompt=3, max_tokens=1)

    assert back_s < 30 * STEP_S


def test_under_overload_who_was_preempted_before_its_first_token_goes_before_newcomers_too():
    """Nobody refuses it, since it was admitted once, and each newcomer would pass it."""
    desk = Desk(num_pages=8, max_batch_tokens=3, max_waiting=10_000, max_sequences=3, slo_ttft_s=1000.0)
    desk.submit("old", 4, max_tokens=20)
    young = desk.submit("young", 24, max_tokens=4)
    before_s = seconds_until(desk, 0.0, lambda: desk.scheduler.num_preemptions > 0, prompt=3, max_tokens=1)
    assert (young.state, young.num_generated) == (State.WAITING, 0)
    assert young.admitted_s is not None

    back_s = seconds_until(desk, before_s, lambda: young.state is State.RUNNING, prompt=3, max_tokens=1)

    assert back_s < 30 * STEP_S


def test_under_overload_newcomers_do_not_keep_the_room_of_a_preempted_request_for_themselves():
    """It needs half of the pool, and they a little of it each, at every step."""
    desk = Desk(num_pages=24, max_sequences=8, max_waiting=10_000, slo_ttft_s=2.0, max_wait_s=5.0)
    for i in range(2):
        desk.submit(f"old {i}", 4, max_tokens=30 + 2 * i)
    large = desk.submit("large", 32, max_tokens=60)
    before_s = 0.0
    while not desk.scheduler.num_preemptions:
        serve(desk, before_s)
        before_s += STEP_S
    assert large.state is State.WAITING

    back_s = seconds_until(desk, before_s, lambda: large.state is State.RUNNING, prompt=4, max_tokens=4)

    assert back_s < 6.0


# --- clustering ---


def test_clustering_keeps_few_adapters_running():
    """S-LoRA's figures 11 and 12: 32 adapters, whose requests wait."""
    trace = trace_of(num_requests=300, num_adapters=32, rate=60.0)
    settings = {"max_sequences": 8, "num_pages": 120, "max_wait_s": 1e9}

    plain, clustered = replay(trace, **settings), replay(trace, cluster=2, **settings)

    def mean(counts: list[int]) -> float:
        return sum(counts) / len(counts)

    assert mean(plain.adapters_of_steps) > 6
    assert mean(clustered.adapters_of_steps) < 0.6 * mean(plain.adapters_of_steps)
    assert clustered.num_placed < 0.5 * plain.num_placed
    assert len(clustered.admitted) == len(plain.admitted) == 300


def test_clustering_is_no_bound_where_nobody_else_could_run():
    """It says who goes first; places that nobody of the cluster wants are not left empty."""
    desk = Desk(packed=dict.fromkeys("abc", 1), cluster=1)
    for name in "abc":
        desk.submit(name, 4, adapter=name)

    assert set(desk.step()) == {"a", "b", "c"}


def test_the_age_cap_holds_for_clustering():
    """A stream of requests for the adapter that runs, and one for another."""
    desk = Desk(packed={"x": 1, "y": 1}, max_sequences=2, cluster=1, max_wait_s=2.0, max_waiting=1000)
    desk.submit("0", 4, max_tokens=4, adapter="x")
    desk.step()
    desk.submit("00", 4, max_tokens=4, adapter="x")
    desk.step()
    other = desk.submit("other", 4, max_tokens=4, adapter="y")
    for step in range(1, 100):
        desk.submit(str(step), 4, max_tokens=4, adapter="x", at_s=step * STEP_S)
        desk.step(now_s=step * STEP_S)
        if other.state is State.RUNNING:
            break

    assert 2.0 <= step * STEP_S < 2.5


# --- prefetch ---


def test_prefetch_loads_while_requests_wait():
    trace = trace_of(num_requests=40, num_adapters=1000, rate=4.0)

    eager, lazy = (replay(trace, load_s=0.4, max_sequences=1, prefetch=prefetch) for prefetch in (True, False))

    assert eager.wait_s() < 0.75 * lazy.wait_s()
    assert set(eager.first_token_s) == set(eager.sequences)
    assert set(lazy.first_token_s) == set(lazy.sequences)


def test_without_prefetch_nothing_is_loaded_before_its_turn():
    desk = Desk(max_sequences=2, prefetch=False)
    desk.submit("base", 4, max_tokens=8)
    for name in "xyz":
        desk.submit(name, 4, adapter=name)

    def wanted() -> list[str]:
        return [target.serving_digest for target in desk.scheduler.wanted_adapters()]

    desk.step()
    assert wanted() == ["x"]  # one place is free
    desk.load("x", 1)
    assert wanted() == []  # it will be taken
    desk.step()
    assert wanted() == []
    while desk.scheduler.get((b"", "base")):
        desk.step()
    assert wanted() == ["y"]


# --- the prefix cache beside adapters ---


@pytest.mark.parametrize(("num_adapters", "alpha", "num_pages"), [(60, 1.0, 250), (60, 0.3, 250), (200, 0.3, 400)])
def test_prompts_that_nobody_repeats_drive_no_adapter_out(num_adapters, alpha, num_pages):
    """Adapters of 180 or 600 pages in a pool of 250 or 400: what is kept of prompts must not cost loads."""
    trace = trace_of(num_requests=1500, num_adapters=num_adapters, alpha=alpha, rate=20.0)
    settings = {"max_sequences": 16, "num_pages": num_pages, "num_slots": num_adapters}

    without, kept = (replay(trace, prefix_cache=cache, **settings) for cache in (False, True))

    assert kept.desk.scheduler.num_cached_tokens == 0
    assert kept.num_placed <= 1.3 * without.num_placed


def test_prompts_that_everybody_repeats_cost_no_adapter_either():
    """Each adapter's requests begin with the same 24 tokens."""
    trace = trace_of(num_requests=1500, num_adapters=60, alpha=0.3, rate=20.0)
    beginnings = {
        adapter: draw_trace(Workload(1, 0, lengths=(24, 25)), seed=adapter) for adapter in set(trace.adapters)
    }
    prompts = tuple(
        beginnings[adapter].prompts[0] + prompt for adapter, prompt in zip(trace.adapters, trace.prompts, strict=True)
    )
    trace = replace(trace, prompts=prompts)
    settings = {"max_sequences": 16, "num_pages": 250, "num_slots": 60}

    without, kept = (replay(trace, prefix_cache=cache, **settings) for cache in (False, True))

    found = kept.desk.scheduler.num_cached_tokens / kept.desk.scheduler.num_prompt_tokens
    assert found > 0.3  # at most 0.63: 24 tokens of 38
    assert kept.num_placed < without.num_placed  # what is shared leaves more room


# --- the engine's switches ---


def test_the_configuration_reaches_the_scheduler(world):
    settings = {
        "fairness": False,
        "max_wait_s": 1.5,
        "slo_ttft_s": 2.0,
        "cluster": 3,
        "prefetch": False,
        "prefix_cache": True,
    }
    engine = world.engine(**settings)
    engine.close()

    assert engine.scheduler.policy == Policy(**settings)


def test_an_engine_refuses_who_comes_too_late_and_goes_on(world):
    """Nobody has a first token within a nanosecond of his arrival; who has no such promise is served."""
    hasty, patient = world.engine(slo_ttft_s=1e-9), world.engine()
    for engine in (hasty, patient):
        ask(engine, "r", [1, 2, 3])
    answers = run_to_end(hasty), run_to_end(patient)

    assert answers[0]["r"].rejected.code == "FL-SLO"
    assert answers[1]["r"].finish_reason == "length"
    assert hasty.heartbeat().aborts == 1
    assert hasty.pages.num_free == hasty.pages.num_usable
    hasty.close()
    patient.close()
