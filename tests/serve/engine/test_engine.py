"""The engine as an object: what it answers, what it holds, and that it gives everything back."""

import msgspec
import pytest

from flora.serve.messages import StepEvents, Submit
from flora.serve.request import SamplingParams
from tests.serve.engine.adapters import random_adapter
from tests.serve.engine.bases import VOCAB
from tests.serve.engine.worlds import GREEDY, PAGE_BYTES, ask, held_pages, run_to_end


def test_tokens_come_one_a_step_and_the_last_says_why_it_is_the_last(world):
    engine = world.engine()
    ask(engine, "r", [1, 2, 3], sampling=msgspec.structs.replace(GREEDY, max_tokens=3))
    answer = run_to_end(engine)["r"]
    engine.close()

    assert [len(event.token_ids) for event in answer.events] == [1, 1, 1]
    assert [event.finish_reason for event in answer.events] == [None, None, "length"]


def test_one_frame_a_step_holds_the_events_of_all_requests_of_a_front_end(world):
    engine = world.engine()
    for client in (b"x", b"y"):
        for name in ("1", "2"):
            engine.submit(Submit(request_id=name, prompt=(1, 2), sampling=GREEDY), client)

    frames = engine.step()

    assert [client for client, _ in frames] == [b"x", b"y"]
    assert all(isinstance(frame, StepEvents) and len(frame.events) == 2 for _, frame in frames)
    engine.close()


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(world):
    engine = world.engine()
    ask(engine, "free", [1, 2, 3])
    tokens = run_to_end(engine)["free"].tokens
    stop = tokens[4]
    first = tokens.index(stop)

    ask(engine, "stopped", [1, 2, 3], sampling=msgspec.structs.replace(GREEDY, stop_token_ids=(stop,)))
    ask(engine, "on", [1, 2, 3], sampling=msgspec.structs.replace(GREEDY, stop_token_ids=(stop,), ignore_eos=True))
    answers = run_to_end(engine)
    engine.close()

    assert answers["stopped"].tokens == tokens[:first]
    assert answers["stopped"].finish_reason == "stop"
    assert answers["stopped"].events[-1].stop_token == stop
    assert answers["on"].tokens == tokens


def test_the_end_of_the_context_ends_the_answer(world):
    engine = world.engine(max_context=20)
    ask(engine, "r", [1] * 17, sampling=msgspec.structs.replace(GREEDY, max_tokens=100))
    answer = run_to_end(engine)["r"]
    engine.close()

    assert len(answer.tokens) == 3
    assert answer.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "code"),
    [((), "FL-REQUEST"), ((1, VOCAB), "FL-REQUEST"), ((-1,), "FL-REQUEST"), ((1,) * 512, "FL-CONTEXT")],
    ids=["empty", "past the vocabulary", "negative", "as long as the context"],
)
def test_a_prompt_that_cannot_be_served_is_refused(world, prompt, code):
    engine = world.engine()
    ask(engine, "bad", list(prompt))
    ask(engine, "good", [1, 2])
    answers = run_to_end(engine)
    engine.close()

    assert answers["bad"].rejected.code == code
    assert answers["good"].finish_reason == "length"


def test_a_request_id_in_use_is_refused_and_its_owner_goes_on(world):
    engine = world.engine()
    ask(engine, "r", [1, 2])
    ask(engine, "r", [3, 4])
    answer = run_to_end(engine)["r"]
    engine.close()

    assert answer.rejected.code == "FL-REQUEST"
    assert answer.finish_reason == "length"


def test_a_full_queue_refuses_and_says_so(world):
    engine = world.engine(max_waiting=2)
    for i in range(3):
        ask(engine, str(i), [1, 2])
    answers = run_to_end(engine)
    engine.close()

    assert answers["2"].rejected.code == "FL-OVERLOAD"
    assert answers["0"].finish_reason == answers["1"].finish_reason == "length"


def test_a_request_larger_than_the_pool_is_refused_on_arrival(world):
    engine = world.engine(pool_bytes=20 * PAGE_BYTES, max_context=300)
    target = world.add(random_adapter(world.config, seed=1, ranks=[4], absent=0.0), "a")
    ask(engine, "base", [1] * 280, sampling=msgspec.structs.replace(GREEDY, max_tokens=20))
    ask(engine, "adapted", [1] * 280, target, msgspec.structs.replace(GREEDY, max_tokens=20))
    answers = run_to_end(engine)
    engine.close()

    assert answers["base"].finish_reason == "length"
    assert answers["adapted"].rejected.code == "FL-PAGES"


def test_an_adapter_larger_than_the_pool_is_refused_before_its_weights_are_read(world):
    engine = world.engine(pool_bytes=5 * PAGE_BYTES)
    target = world.add(random_adapter(world.config, seed=1, ranks=[64], absent=0.0), "a")
    ask(engine, "adapted", [1, 2], target, msgspec.structs.replace(GREEDY, max_tokens=1))
    answers = run_to_end(engine)
    engine.close()

    assert answers["adapted"].rejected.code == "FL-PAGES"
    assert "pool has 5" in answers["adapted"].rejected.message


# --- preemption ---


def test_a_preempted_request_resumes_with_the_same_tokens(world):
    """Twelve sequences that grow to five pages each, in a pool of thirty."""
    target = world.add(random_adapter(world.config, seed=1, ranks=[2], absent=0.5), "a")
    sampling = SamplingParams(max_tokens=48, temperature=0.8, seed=3, logprobs=2)
    roomy, tight = world.engine(), world.engine(pool_bytes=30 * PAGE_BYTES)
    for engine in (roomy, tight):
        for i in range(12):
            ask(engine, str(i), [i + 1] * 20, target if i % 3 else None, sampling)
    expected, answers = run_to_end(roomy), run_to_end(tight)

    assert roomy.heartbeat().preemptions == 0
    assert tight.heartbeat().preemptions > 0
    for name, answer in answers.items():
        assert answer.tokens == expected[name].tokens
        assert [event.logprobs for event in answer.events] == [event.logprobs for event in expected[name].events]
    assert held_pages(tight) == 0
    roomy.close()
    tight.close()


# --- failures inside ---


def test_a_step_that_fails_ends_its_requests_and_the_engine_goes_on(world):
    engine = world.engine()
    ask(engine, "r", [1, 2])
    ask(engine, "s", [1, 2])
    forward = engine.runner.forward

    def broken(batch):
        raise RuntimeError("no memory")

    engine.runner.forward = broken
    answers = run_to_end(engine)
    engine.runner.forward = forward
    ask(engine, "after", [1, 2])
    after = run_to_end(engine)["after"]

    for name in ("r", "s"):
        assert answers[name].finish_reason == "error"
        assert "no memory" in answers[name].events[-1].error
    assert after.finish_reason == "length"
    assert held_pages(engine) == 0
    engine.close()


def test_an_adapter_that_could_not_be_written_is_not_resident(world):
    target = world.add(random_adapter(world.config, seed=1), "a")
    engine = world.engine()
    write = engine.runner.write_adapter

    def broken(*_):
        raise RuntimeError("copy failed")

    engine.runner.write_adapter = broken
    ask(engine, "r", [1, 2], target)
    answers = run_to_end(engine)
    assert answers["r"].finish_reason == "error"
    assert len(engine.residency) == 0

    engine.runner.write_adapter = write
    ask(engine, "again", [1, 2], target)
    assert run_to_end(engine)["again"].finish_reason == "length"
    engine.close()
