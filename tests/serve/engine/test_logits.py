"""The numbers, against outside judges: transformers for the base, transformers with PEFT for adapters, in float32."""

import random

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flora.adapter import Adapter, make_adapter
from flora.serve.request import SamplingParams
from tests.serve.engine.adapters import random_adapter, with_peft
from tests.serve.engine.bases import FAMILIES, VOCAB, load_judge
from tests.serve.engine.worlds import LogitsTap, World, ask, run_to_end

TOLERANCE = 1e-5  # of the largest logit
LENGTHS = (1, 7, 16, 33, 70)  # one token, within a page, a page, over pages, over attention's blocks of 64


def judged_logits(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> Tensor:
    """The judge's logits where each token of the answer was drawn, [len(answer), vocab_size]."""
    with torch.no_grad():
        return model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]


def judged_answer(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    generated = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return generated[0, len(prompt) :].tolist()


def relative_error(ours: Tensor, judged: Tensor) -> float:
    return float((ours - judged).abs().max() / judged.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_agrees_with_transformers_and_peft(bases, tmp_path, family):
    """Prompts of five lengths on the base and on three adapters, all in flight at once, each against its own judge."""
    world = World(bases(family), tmp_path)
    adapters: dict[str, Adapter | None] = {"base": None}
    adapters |= {f"adapter{seed}": random_adapter(world.config, seed) for seed in (1, 2, 3)}
    targets = {name: world.add(adapter, name) if adapter else None for name, adapter in adapters.items()}
    seeded = random.Random(0)
    prompts = {(name, n): [seeded.randrange(VOCAB) for _ in range(n)] for n in LENGTHS for name in adapters}

    engine = world.engine(max_batch_tokens=48)
    tap = LogitsTap(engine)
    for (name, n), prompt in prompts.items():
        ask(engine, f"{name}/{n}", prompt, targets[name], SamplingParams(max_tokens=8, temperature=0.0))
    answers = run_to_end(engine)
    engine.close()

    for name, adapter in adapters.items():
        judge = load_judge(world.base)
        if adapter:
            judge = with_peft(judge, adapter)
        for n in LENGTHS:
            prompt, answer = prompts[name, n], answers[f"{name}/{n}"].tokens
            judged = judged_logits(judge, prompt, answer)
            assert relative_error(tap.of(f"{name}/{n}"), judged) <= TOLERANCE
            assert answer == judged.argmax(-1).tolist()
        assert answers[f"{name}/16"].tokens == judged_answer(judge, prompts[name, 16], 8)


def test_an_adapter_really_changes_the_answer(world):
    """Else the agreement above would say little."""
    target = world.add(random_adapter(world.config, 1), "a")
    engine = world.engine()
    tap = LogitsTap(engine)

    ask(engine, "base", [1, 2, 3])
    ask(engine, "adapted", [1, 2, 3], target)
    run_to_end(engine)
    engine.close()

    assert relative_error(tap.of("adapted")[:1], tap.of("base")[:1]) > 0.02


@pytest.mark.parametrize("rank", [1, 63, 64])
def test_a_rank_that_fills_no_block_is_computed_in_full(world, rank):
    adapter = random_adapter(world.config, seed=5, ranks=[rank], absent=0.0)
    target = world.add(adapter, "a")
    engine = world.engine()
    tap = LogitsTap(engine)

    ask(engine, "r", list(range(20)), target)
    answer = run_to_end(engine)["r"].tokens
    engine.close()

    judge = with_peft(load_judge(world.base), adapter)
    assert relative_error(tap.of("r"), judged_logits(judge, list(range(20)), answer)) <= TOLERANCE


def test_an_adapter_of_one_module_leaves_the_others_alone(world):
    full = random_adapter(world.config, seed=6, absent=0.0)
    name = "model.layers.1.self_attn.v_proj"
    adapter = make_adapter({name: full.factors[name]}, full.header.base, full.header.recipe)
    target = world.add(adapter, "a")
    engine = world.engine()
    tap = LogitsTap(engine)

    ask(engine, "r", [5, 6, 7], target)
    answer = run_to_end(engine)["r"].tokens
    engine.close()

    judge = with_peft(load_judge(world.base), adapter)
    assert relative_error(tap.of("r"), judged_logits(judge, [5, 6, 7], answer)) <= TOLERANCE
