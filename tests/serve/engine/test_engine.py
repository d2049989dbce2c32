"""The engine as an object: what it answers, what it holds, and that it gives everything back."""

import random
from dataclasses import replace

import msgspec
import pytest
import torch

from flora.adapter import AdapterHeader, ChangeReport, TensorChange, make_adapter
from flora.lowrank import LowRank
from flora.serve.engine import Engine
from flora.serve.engine.schedule.pages import Use
from flora.serve.engine.schedule.sequence import State
from flora.serve.messages import (
    AdapterLoaded,
    AdapterUnloaded,
    Cancel,
    LoadAdapter,
    Rejected,
    StepEvents,
    Submit,
    UnloadAdapter,
)
from flora.serve.request import SamplingParams
from tests.serve.engine.adapters import module_name, random_adapter
from tests.serve.engine.bases import VOCAB
from tests.serve.engine.worlds import GREEDY, World, ask, collect, run_to_end

PAGE_BYTES = 8192  # of the small Llama: 2 layers, 2 key heads of 16, 16 tokens, float32


def held_pages(engine: Engine) -> int:
    """Pages that neither are free nor belong to a resident adapter."""
    return engine.pages.num_usable - engine.pages.num_free - engine.pages.count(Use.ADAPTER)


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


# --- adapters come and go ---


def test_the_least_recently_used_adapter_is_evicted_and_comes_back(world):
    targets = [world.add(random_adapter(world.config, seed, ranks=[8], absent=0.0), f"a{seed}") for seed in range(4)]
    engine, roomy = world.engine(max_adapters=2), world.engine()
    order = [0, 1, 2, 0, 3, 1]
    for number, which in enumerate(order):
        for one in (engine, roomy):
            ask(one, str(number), [1, 2, 3], targets[which])
        answer, expected = run_to_end(engine)[str(number)], run_to_end(roomy)[str(number)]
        assert answer.tokens == expected.tokens

    beat = engine.heartbeat()
    assert beat.adapter_evictions == 4
    assert beat.adapter_loads == 4  # what was evicted came back from host memory
    assert {resident.label for resident in beat.resident} == {"a3", "a1"}
    engine.close()
    roomy.close()


def test_what_host_memory_does_not_hold_is_read_again(world):
    targets = [world.add(random_adapter(world.config, seed, ranks=[8], absent=0.0), f"a{seed}") for seed in range(2)]
    engine = world.engine(max_adapters=1, host_cache_bytes=1)
    for number in range(4):
        ask(engine, str(number), [1, 2, 3], targets[number % 2])
        assert run_to_end(engine)[str(number)].finish_reason == "length"

    assert engine.heartbeat().adapter_loads == 4
    engine.close()


def test_two_versions_with_one_serving_digest_are_one_resident_adapter(world):
    """A version is more than what changes the answer: its report and lineage too."""
    adapter = random_adapter(world.config, seed=1)
    first = world.add(adapter, "a")
    lineage = msgspec.structs.replace(adapter.header.recipe, parents=("sha256:" + "1" * 64,))
    header = msgspec.structs.replace(adapter.header, recipe=lineage)
    second = world.add(replace(adapter, header=header), "b")
    assert (first.serving_digest, first.version_digest != second.version_digest) == (second.serving_digest, True)

    engine = world.engine()
    ask(engine, "first", [1, 2], first)
    ask(engine, "second", [1, 2], second)
    answers = run_to_end(engine)

    assert answers["first"].tokens == answers["second"].tokens
    assert len(engine.residency) == 1
    assert engine.heartbeat().adapter_loads == 1
    engine.close()


def test_nothing_of_a_name_outlives_its_requests(world):
    """A client may ask for any number of names: what stays is bounded by adapters that exist."""
    engine = world.engine()
    target = world.add(random_adapter(world.config, seed=1), "a")
    for i in range(50):
        unknown = msgspec.structs.replace(
            target, serving_digest=f"sha256:{i:064x}", version_digest=f"sha256:{i:064x}", label=f"name{i}"
        )
        ask(engine, str(i), [1, 2], unknown)
    answers = run_to_end(engine)

    assert {answer.rejected.code for answer in answers.values()} == {"FL-ADAPTER"}
    assert len(engine.residency) == 0
    assert engine.host.num_bytes == 0
    assert engine.heartbeat().waiting_by_adapter == {}
    engine.close()


def test_an_adapter_is_made_resident_on_demand_and_let_go(world):
    target = world.add(random_adapter(world.config, seed=1), "a")
    engine = world.engine()

    engine.load_adapter(LoadAdapter(request_id="l", adapter=target, pinned=True))
    [(_, loaded)] = [told for _ in range(9) for told in engine.step(wait_s=10.0)][:1]
    assert isinstance(loaded, AdapterLoaded)
    assert engine.heartbeat().resident[0].pinned

    engine.unload_adapter(UnloadAdapter(request_id="u", serving_digest=target.serving_digest))
    [(_, unloaded)] = engine.step()
    assert isinstance(unloaded, AdapterUnloaded)
    assert unloaded.was_resident
    assert engine.pages.num_free == engine.pages.num_usable
    assert engine.host.num_bytes == 0
    engine.close()


def test_unloading_lets_running_requests_finish(world):
    target = world.add(random_adapter(world.config, seed=1), "a")
    engine = world.engine()
    ask(engine, "r", [1, 2, 3], target)
    answers = {}
    while "r" not in answers:
        collect(engine.step(wait_s=10.0), answers)

    engine.unload_adapter(UnloadAdapter(request_id="u", serving_digest=target.serving_digest))
    rest = run_to_end(engine)["r"]

    assert rest.finish_reason == "length"
    assert len(engine.residency) == 0
    engine.close()


def test_a_load_without_room_for_good_is_refused(world):
    small = world.add(random_adapter(world.config, seed=1, ranks=[8], absent=0.0), "small")
    large = world.add(random_adapter(world.config, seed=2, ranks=[16], absent=0.0), "large")
    engine = world.engine(pool_bytes=24 * PAGE_BYTES)
    engine.load_adapter(LoadAdapter(request_id="pin", adapter=small, pinned=True))
    run_to_end(engine)

    engine.load_adapter(LoadAdapter(request_id="more", adapter=large))
    answers = run_to_end(engine)

    assert answers["more"].rejected.code == "FL-PAGES"
    engine.close()


# --- loads that fail ---


def test_a_load_that_fails_refuses_only_the_requests_that_wait_for_it(world):
    sound = world.add(random_adapter(world.config, seed=1), "sound")
    broken = world.add(random_adapter(world.config, seed=2), "broken")
    for blob in sorted((world.home / "registry" / "blobs").rglob("*")):
        if blob.is_file() and blob.stat().st_size > 1000 and blob.stat().st_mtime_ns == newest_blob(world):
            blob.write_bytes(blob.read_bytes()[:-100])
    engine = world.engine()
    ask(engine, "broken1", [1, 2], broken)
    ask(engine, "sound", [1, 2], sound)
    ask(engine, "broken2", [1, 2], broken)
    ask(engine, "base", [1, 2])
    engine.load_adapter(LoadAdapter(request_id="order", adapter=broken))
    answers = run_to_end(engine)
    engine.close()

    for name in ("broken1", "broken2", "order"):
        assert answers[name].rejected.code == "FL-STORE"
    assert answers["sound"].finish_reason == answers["base"].finish_reason == "length"


def newest_blob(world: World) -> int:
    blobs = (world.home / "registry" / "blobs").rglob("*")
    return max(blob.stat().st_mtime_ns for blob in blobs if blob.is_file() and blob.stat().st_size > 1000)


def adapter_of(world: World, name: str, in_features: int, out_features: int, value: float = 0.1, **binding: object):
    header: AdapterHeader = random_adapter(world.config, seed=1).header
    factors = LowRank(A=torch.full((2, in_features), value), B=torch.full((out_features, 2), 0.1))
    return make_adapter({name: factors}, msgspec.structs.replace(header.base, **binding), header.recipe)


def refusal(world: World, adapter) -> Rejected:
    target = world.add(adapter, "bad")
    engine = world.engine()
    ask(engine, "bad", [1, 2], target)
    ask(engine, "base", [1, 2])
    answers = run_to_end(engine)
    engine.close()
    assert answers["base"].finish_reason == "length"
    return answers["bad"].rejected


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens", "model.layers.0.self_attn.rotary"])
def test_a_module_that_the_server_cannot_adapt_is_refused_never_skipped(world, name):
    refused = refusal(world, adapter_of(world, name, 64, VOCAB))

    assert refused.code == "FL-UNSUPPORTED"
    assert name in refused.message


def test_a_refused_module_is_named_with_its_share_of_the_change(world):
    adapter = adapter_of(world, "lm_head", 64, VOCAB)
    changes = tuple(
        TensorChange(name=name, shape=(1, 1), status="extracted", norm_squared=norm)
        for name, norm in (("lm_head.weight", 1.0), ("model.layers.0.self_attn.q_proj.weight", 3.0))
    )

    refused = refusal(world, replace(adapter, report=ChangeReport(tensors=changes)))

    assert "lm_head (25.0% of the change)" in refused.message


def test_an_adapter_of_the_served_base_needs_no_further_proof(world, caplog):
    engine = world.engine()
    adapter = random_adapter(world.config, seed=1, base_id=engine.ready.base_id)
    ask(engine, "r", [1, 2], world.add(adapter, "a"))

    assert run_to_end(engine)["r"].finish_reason == "length"
    assert "unproven" not in caplog.text
    engine.close()


def test_a_module_of_another_size_is_refused(world):
    refused = refusal(world, adapter_of(world, module_name(0, "q"), 32, 64))

    assert refused.code == "FL-SHAPE"
    assert "[64, 32] in the adapter, [64, 64] in the base" in refused.message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_are_refused(world, value):
    refused = refusal(world, adapter_of(world, module_name(0, "q"), 64, 64, value))

    assert refused.code == "FL-NOTFINITE"
    assert module_name(0, "q") in refused.message


def test_an_adapter_of_other_base_weights_is_refused(world):
    touched = {f"{module_name(0, 'q')}.weight": "0" * 64}
    adapter = adapter_of(world, module_name(0, "q"), 64, 64, base_id="sha256:" + "1" * 64, touched=touched)

    refused = refusal(world, adapter)

    assert refused.code == "FL-BASE"
    assert "1 of the 1 tensors that it changes" in refused.cause


# --- cancel, drain ---


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
    """240 requests of any length, adapter and sampling, a fifth of them cancelled at some step, in a tight pool."""
    seeded = random.Random(11)
    targets = [
        world.add(random_adapter(world.config, seed, ranks=range(1, 9), absent=0.5), f"a{seed}") for seed in range(6)
    ]
    engine = world.engine(pool_bytes=60 * PAGE_BYTES, max_sequences=12, max_batch_tokens=64, max_adapters=4)
    names = [str(i) for i in range(240)]
    to_cancel = set(seeded.sample(names, 48))
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
