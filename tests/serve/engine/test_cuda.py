"""The engine on a GPU: captured graphs and overlapped steps tell what transformers with PEFT would."""

import random

import pytest
import torch

from flora.adapter import Adapter
from flora.serve.engine import Engine
from flora.serve.engine.residency import Resident
from flora.serve.request import AdapterTarget, SamplingParams
from tests.serve.engine.adapters import random_adapter, with_peft
from tests.serve.engine.bases import VOCAB, load_judge
from tests.serve.engine.worlds import World, ask, run_to_end

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU = {"device": "cuda", "max_sequences": 24, "max_batch_tokens": 64, "poison": True}
FAMILIES = ("llama", "qwen2", "qwen3", "smollm2-135m", "qwen2.5-0.5b")


def prompt_of(num_tokens: int, seed: int) -> list[int]:
    seeded = random.Random(seed)
    return [seeded.randrange(VOCAB) for _ in range(num_tokens)]


def judged_answer(world: World, adapter: Adapter | None, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens of transformers, with PEFT where there is an adapter, in float32 on the CPU."""
    judge = load_judge(world.base)
    judge = with_peft(judge, adapter) if adapter else judge
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(num_tokens):
            tokens.append(int(judge(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("loaders", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers_and_peft(bases, tmp_path, family, loaders):
    """More rows with adapters of their own than any graph was captured with; a different rank in every module."""
    world = World(bases(family), tmp_path)
    ranks = (1, 3, 4, 8, 64, 128)
    adapters: dict[str, Adapter | None] = {"base": None}
    adapters |= {f"adapter{seed}": random_adapter(world.config, seed, ranks=ranks) for seed in range(8)}
    targets = {name: world.add(adapter, name) if adapter else None for name, adapter in adapters.items()}
    engine = world.engine(**GPU, num_loaders=loaders, host_cache_bytes=64 << 20)
    prompts = {(name, n): prompt_of(n, seed=n) for name in adapters for n in (1, 17, 70)}

    for (name, n), prompt in prompts.items():
        ask(engine, f"{name}/{n}", prompt, targets[name], SamplingParams(max_tokens=10, temperature=0.0))
    answers = run_to_end(engine)

    for (name, n), prompt in prompts.items():
        assert answers[f"{name}/{n}"].tokens == judged_answer(world, adapters[name], prompt, 10), (name, n)
    assert engine.pages.num_free + sum(len(resident.pages) for resident in engine.residency) == engine.pages.num_usable
    engine.close()


def test_an_adapter_that_comes_back_to_other_pages_answers_as_before(bases, tmp_path):
    world = World(bases("llama"), tmp_path)
    adapter = random_adapter(world.config, 1)
    target, other = world.add(adapter, "it"), world.add(random_adapter(world.config, 2), "other")
    engine = world.engine(**GPU)
    prompt = prompt_of(20, seed=0)
    expected = judged_answer(world, adapter, prompt, 12)

    def answer(request_id: str) -> list[int]:
        ask(engine, request_id, prompt, target)
        return run_to_end(engine)[request_id].tokens

    first, before = answer("first"), place(engine, target).pages
    engine.residency.remove(target.serving_digest)
    ask(engine, "between", prompt, other)
    run_to_end(engine)
    again, after = answer("again"), place(engine, target).pages

    assert before != after
    assert first == again == expected
    engine.close()


def place(engine: Engine, target: AdapterTarget) -> Resident:
    resident = engine.residency.get(target.serving_digest)
    assert resident is not None
    return resident


@pytest.mark.parametrize("trial", range(20))
def test_neighbours_never_matter_in_a_padded_batch_of_one_shape(bases, tmp_path, trial):
    """The watched request's tokens and log probabilities, with 23 neighbours of other adapters, some full of NaN."""
    seeded = random.Random(trial)
    world = World(bases(seeded.choice(FAMILIES)), tmp_path)
    targets = [world.add(random_adapter(world.config, seed), f"a{seed}") for seed in range(4)]
    broken = world.add(random_adapter(world.config, 9), "broken")
    watched = SamplingParams(max_tokens=8, temperature=0.0, logprobs=5)
    prompt = prompt_of(seeded.randrange(1, 40), seed=trial)

    def run(neighbours: list[AdapterTarget | None]) -> list:
        engine = world.engine(**GPU)
        if broken in neighbours:
            ask(engine, "load", [1], broken)
            run_to_end(engine)
            engine.runner.pool.poison(place(engine, broken).pages)
        ask(engine, "watched", prompt, targets[0], watched)
        while not engine.scheduler.running:
            engine.step(wait_s=5.0)
        for i, target in enumerate(neighbours):
            ask(engine, f"n{i}", prompt_of(1, seed=i), target, SamplingParams(max_tokens=8, temperature=0.0))
        answers = run_to_end(engine)
        engine.close()
        return [(event.token_ids, event.logprobs) for event in answers["watched"].events]

    plain = run([None] * 23)
    mixed = run([seeded.choice([None, *targets[1:], broken]) for _ in range(23)])

    assert [tokens for tokens, _ in plain] == [tokens for tokens, _ in mixed]


def test_a_seeded_draw_is_the_same_alone_and_in_company(bases, tmp_path):
    world = World(bases("llama"), tmp_path)
    engine = world.engine(**GPU)
    drawn = SamplingParams(max_tokens=10, temperature=0.9, top_p=0.8, top_k=50, seed=3)
    prompt = prompt_of(9, seed=1)

    ask(engine, "alone", prompt, None, drawn)
    alone = run_to_end(engine)["alone"].tokens
    for i in range(12):
        ask(engine, f"n{i}", prompt_of(i + 1, seed=i), None, SamplingParams(max_tokens=10, temperature=1.3, seed=i))
    ask(engine, "company", prompt, None, drawn)

    assert run_to_end(engine)["company"].tokens == alone
    engine.close()
