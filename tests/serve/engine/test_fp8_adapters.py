"""Adapters in fp8: the rounded adapter's own answers, in half the room or a quarter."""

import pytest
import torch

from flora.adapter import make_adapter
from flora.errors import UsageError
from flora.lowrank import LowRank
from flora.serve.engine import Engine
from flora.serve.request import AdapterTarget, SamplingParams
from tests.serve.engine.adapters import random_adapter, rounded_to_fp8, with_peft
from tests.serve.engine.bases import FAMILIES, load_judge
from tests.serve.engine.test_isolation import prompt_of
from tests.serve.engine.test_logits import TOLERANCE, judged_answer, judged_logits, relative_error
from tests.serve.engine.worlds import LogitsTap, World, ask, run_to_end

FP8 = {"adapter_dtype": "float8_e4m3fn"}
TOLD = SamplingParams(max_tokens=8, temperature=0.0)


def pages_of(engine: Engine, target: AdapterTarget) -> int:
    resident = engine.residency.get(target.serving_digest)
    assert resident is not None
    return len(resident.pages)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_tokens_are_those_of_peft_with_the_rounded_factors(bases, tmp_path, family):
    world = World(bases(family), tmp_path)
    adapters = [random_adapter(world.config, seed) for seed in (1, 2, 3)]
    targets = [world.add(adapter, f"a{seed}") for seed, adapter in enumerate(adapters)]
    engine = world.engine(max_batch_tokens=48, **FP8)
    tap = LogitsTap(engine)
    for number, target in enumerate(targets):
        ask(engine, str(number), prompt_of(9 + 20 * number, seed=number), target, TOLD)
    answers = run_to_end(engine)
    engine.close()

    for number, adapter in enumerate(adapters):
        judge, prompt = with_peft(load_judge(world.base), rounded_to_fp8(adapter)), prompt_of(9 + 20 * number, number)
        told = answers[str(number)].tokens
        assert told == judged_answer(judge, prompt, 8)
        assert relative_error(tap.of(str(number)), judged_logits(judge, prompt, told)) < TOLERANCE


def logits(world: World, target: AdapterTarget, **settings: object) -> torch.Tensor:
    engine = world.engine(**settings)
    tap = LogitsTap(engine)
    ask(engine, "it", prompt_of(20), target, TOLD)
    run_to_end(engine)
    engine.close()
    return tap.of("it")


def test_an_adapter_that_is_stored_in_fp8_loses_nothing(bases, tmp_path):
    """As `flora extract --dtype float8` makes them: the same logits, bit for bit."""
    world = World(bases("llama"), tmp_path)

    def stored(factors: LowRank) -> LowRank:
        A, B = ((matrix * 2.0**11).to(torch.float8_e4m3fn) for matrix in (factors.A, factors.B))
        return LowRank(A, B, factors.scale * 2.0**-22)

    drawn = random_adapter(world.config, 1)
    factors = {name: stored(factors) for name, factors in drawn.factors.items()}
    target = world.add(make_adapter(factors, drawn.header.base, drawn.header.recipe), "it")

    assert torch.equal(logits(world, target, **FP8), logits(world, target))


def test_it_takes_a_quarter_of_the_pages_that_float32_takes(bases, tmp_path):
    world = World(bases("llama"), tmp_path)
    target = world.add(random_adapter(world.config, 1, absent=0.0), "it")
    taken = {}
    for name, settings in (("float32", {}), ("fp8", FP8)):
        engine = world.engine(**settings)
        ask(engine, "it", prompt_of(5), target)
        run_to_end(engine)
        taken[name] = pages_of(engine, target)
        engine.close()

    assert taken["float32"] >= 20
    assert taken["fp8"] == pytest.approx(taken["float32"] / 4, abs=1)


@pytest.mark.parametrize("loaders", [0, 1])
def test_a_loader_process_packs_as_a_thread_does(bases, tmp_path, loaders):
    world = World(bases("llama"), tmp_path)
    adapter = random_adapter(world.config, 4)
    target = world.add(adapter, "it")

    engine = world.engine(num_loaders=loaders, host_cache_bytes=64 << 20, **FP8)
    ask(engine, "it", prompt_of(12), target, TOLD)
    answer = run_to_end(engine)["it"].tokens
    engine.close()

    assert answer == judged_answer(with_peft(load_judge(world.base), rounded_to_fp8(adapter)), prompt_of(12), 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float16", **FP8}, "not in float16"),
        ({"adapter_dtype": "int4"}, "'int4' is not a dtype of adapters"),
        ({"dtype": "float32", "adapter_dtype": "bfloat16"}, "'bfloat16' is not a dtype of adapters"),
    ],
)
def test_what_cannot_be_served_is_refused_at_the_start(bases, tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        World(bases("llama"), tmp_path).engine(**settings)
