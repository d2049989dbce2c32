"""Whoever goes away before the end: cancelled requests, front ends that are gone, and what they held."""

import random

import pytest

from flora.serve.engine.schedule.sequence import State
from flora.serve.messages import Cancel, Submit, UnloadAdapter
from flora.serve.request import SamplingParams
from tests.conftest import IS_FULL
from tests.serve.engine.adapters import random_adapter
from tests.serve.engine.bases import VOCAB
from tests.serve.engine.worlds import GREEDY, PAGE_BYTES, ask, collect, held_pages, run_to_end


@pytest.mark.parametrize("phase", ["waiting", "loading", "prefilling", "decoding", "preempted"])
def test_a_cancel_gives_all_pages_back_in_every_phase(world, phase):
    target = world.add(random_adapter(world.config, seed=1, ranks=[2], absent=0.5), "a")
    engine = world.engine(max_batch_tokens=16, max_sequences=2)
    if phase == "waiting":
        for i in range(2):
            ask(engine, f"other{i}", [1, 2, 3])
        engine.step()
    ask(engine, "r", [1] * 60, target if phase == "loading" else None)
    if phase in ("prefilling", "decoding", "preempted"):
        engine.step()
    sequence = engine.scheduler.get((b"", "r"))
    while phase in ("decoding", "preempted") and sequence.num_generated == 0:
        engine.step()
    if phase == "preempted":
        engine.scheduler._preempt(sequence)
    assert sequence.state is (State.RUNNING if phase in ("prefilling", "decoding") else State.WAITING)

    engine.cancel(Cancel(request_id="r"))
    answers = run_to_end(engine)

    assert answers["r"].finish_reason == "cancelled"
    assert held_pages(engine) == 0
    engine.close()


def test_a_cancel_of_what_is_not_there_is_nothing(world):
    engine = world.engine()
    engine.cancel(Cancel(request_id="r"))

    assert engine.is_idle
    engine.close()


def test_a_front_end_that_is_gone_takes_its_requests_with_it(world):
    engine = world.engine()
    for client in (b"gone", b"here"):
        engine.submit(Submit(request_id="r", prompt=(1, 2), sampling=GREEDY), client)
    engine.step()

    engine.abandon(b"gone")
    told = [(client, event) for _ in range(20) for client, frame in engine.step() for event in frame.events]

    assert [event.finish_reason for client, event in told if client == b"gone"] == ["cancelled"]
    assert [event.finish_reason for client, event in told if client == b"here"][-1] == "length"
    assert held_pages(engine) == 0
    engine.close()


def test_random_requests_drain_and_leave_nothing_held(world):
    """Requests of any length, adapter and sampling, a fifth of them cancelled at some step, in a tight pool."""
    seeded = random.Random(11)
    targets = [
        world.add(random_adapter(world.config, seed, ranks=range(1, 9), absent=0.5), f"a{seed}") for seed in range(6)
    ]
    engine = world.engine(pool_bytes=60 * PAGE_BYTES, max_sequences=12, max_batch_tokens=64, max_adapters=4)
    names = [str(i) for i in range(240 if IS_FULL else 120)]
    to_cancel = seeded.sample(names, len(names) // 5)
    answers: dict = {}
    for name in names:
        sampling = SamplingParams(
            max_tokens=seeded.randrange(1, 30), temperature=seeded.choice([0.0, 0.7]), seed=seeded.randrange(99)
        )
        prompt = [seeded.randrange(VOCAB) for _ in range(seeded.randrange(1, 60))]
        ask(engine, name, prompt, seeded.choice([None, *targets]), sampling)
        if seeded.random() < 0.5:
            collect(engine.step(), answers)
        if to_cancel and seeded.random() < 0.2:
            engine.cancel(Cancel(request_id=to_cancel.pop()))
    for name, answer in run_to_end(engine).items():
        collected = answers.setdefault(name, answer)
        if collected is not answer:
            collected.events += answer.events

    assert set(answers) == set(names)
    assert all(answer.finish_reason in ("length", "cancelled") for answer in answers.values())
    assert held_pages(engine) == 0
    for resident in list(engine.residency):
        assert resident.running == 0
        engine.unload_adapter(UnloadAdapter(request_id="u", serving_digest=resident.digest))
    assert engine.pages.num_free == engine.pages.num_usable
    engine.close()
