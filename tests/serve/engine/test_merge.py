"""Merge mode: the engine answers as PEFT's merged model does, and serves nothing else."""

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM

from flora.adapter import BaseBinding, Recipe, make_adapter
from flora.checkpoint import open_checkpoint
from flora.errors import BaseMismatch, ShapeMismatch, Unsupported
from flora.identity import base_record
from flora.lowrank import LowRank
from flora.serve.engine.merge import merge_into
from flora.serve.messages import LoadAdapter
from tests.serve.engine.adapters import random_adapter, with_peft
from tests.serve.engine.bases import VOCAB
from tests.serve.engine.test_isolation import prompt_of
from tests.serve.engine.worlds import LogitsTap, World, ask, run_to_end


def logits_of(engine, prompt: list[int], adapter=None) -> tuple[torch.Tensor, list[int]]:
    tap = LogitsTap(engine)
    ask(engine, "r", prompt, adapter)
    answer = run_to_end(engine)["r"]
    return tap.of("r"), answer.tokens


@pytest.mark.parametrize("family", ["llama", "qwen3", "smollm2-135m"])
def test_the_merged_engine_answers_as_the_model_that_peft_merges(bases, tmp_path, family):
    world = World(bases(family), tmp_path)
    adapter = random_adapter(world.config, seed=1)
    target = world.add(adapter, "a")
    engine = world.engine(merge=target)
    prompt = prompt_of(30)
    logits, tokens = logits_of(engine, prompt)
    engine.close()

    model = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float64)
    merged = with_peft(model, adapter).merge_and_unload()
    with torch.inference_mode():
        expected = merged(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        plain = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float64)(torch.tensor([prompt])).logits
    assert tokens == expected.argmax(-1).tolist()
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=1e-4)
    assert (plain[0, -1] - expected[0]).abs().max() > 100 * 1e-4  # the adapter does change the answer


def test_a_merged_tensor_is_rounded_once(world):
    """W + scale * B @ A in float64, brought to bfloat16, is what the model multiplies by, but for ties of rounding."""
    adapter = random_adapter(world.config, seed=1, absent=0.0)
    target = world.add(adapter, "a")
    base = open_checkpoint(world.base)
    record = base_record(base, world.home / "cache")
    merged = merge_into(base, record, str(world.home / "registry"), target)

    for module, factors in adapter:
        name = f"{module.name}.weight"
        exact = base.load(name).double() + factors.scale * factors.B.double() @ factors.A.double()
        assert merged.load(name).dtype == torch.float32
        differing = merged.load(name).bfloat16() != exact.float().bfloat16()
        assert differing.double().mean() < 1e-3
        torch.testing.assert_close(merged.load(name).double(), exact, atol=1e-6, rtol=1e-6)


def test_embeddings_norms_and_heads_are_merged_too(world):
    """What no batch of several adapters could share is no trouble for one alone."""
    base = open_checkpoint(world.base)
    generator = torch.Generator().manual_seed(3)
    factors = {
        name: LowRank(
            A=torch.randn(4, 64, generator=generator) * 0.1, B=torch.randn(VOCAB, 4, generator=generator) * 0.1
        )
        for name in ("model.embed_tokens", "lm_head")
        if f"{name}.weight" in base.tensors
    }
    norm = torch.rand(64, generator=generator) + 0.5
    adapter = make_adapter(
        factors, BaseBinding(name="tiny", base_id=None), Recipe(operation="import"), exact={"model.norm.weight": norm}
    )
    engine = world.engine(merge=world.add(adapter, "a"))
    prompt = prompt_of(20)
    logits, tokens = logits_of(engine, prompt)
    engine.close()

    model = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float64)
    weights = model.state_dict()
    with torch.inference_mode():
        for name, low in factors.items():
            weights[f"{name}.weight"] += low.delta().double()
        weights["model.norm.weight"].copy_(norm)
        expected = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=1e-4)


def test_a_merged_engine_refuses_every_adapter(world):
    """Its rows would be those of the other adapter, on weights that are not the base's."""
    target = world.add(random_adapter(world.config, seed=1), "a")
    other = world.add(random_adapter(world.config, seed=2), "b")
    engine = world.engine(merge=target)
    ask(engine, "same", [1, 2], target)
    ask(engine, "other", [1, 2], other)
    ask(engine, "merged", [1, 2])
    engine.load_adapter(LoadAdapter(request_id="load", adapter=other))
    answers = run_to_end(engine)
    engine.close()

    assert {name: answer.rejected.code for name, answer in answers.items() if answer.rejected} == dict.fromkeys(
        ("same", "other", "load"), "FL-REQUEST"
    )
    assert "--merge" in answers["other"].rejected.fix
    assert answers["merged"].finish_reason == "length"
    assert engine.ready.merged == target.serving_digest


@pytest.mark.parametrize(
    ("name", "shape", "binding", "error"),
    [
        ("model.layers.9.self_attn.q_proj", (64, 64), {}, Unsupported),
        ("model.layers.0.self_attn.q_proj", (32, 64), {}, ShapeMismatch),
        ("model.layers.0.self_attn.q_proj", (64, 64), {"base_id": "sha256:" + "1" * 64}, BaseMismatch),
    ],
    ids=["no such tensor", "another size", "another base"],
)
def test_what_does_not_fit_stops_the_engine(world, name, shape, binding, error):
    header = random_adapter(world.config, seed=1).header
    factors = LowRank(A=torch.full((2, shape[1]), 0.1), B=torch.full((shape[0], 2), 0.1))
    adapter = make_adapter({name: factors}, msgspec.structs.replace(header.base, **binding), header.recipe)

    with pytest.raises(error):
        world.engine(merge=world.add(adapter, "bad"))


def test_an_adapter_of_another_base_is_merged_by_permission_alone_and_noted(world):
    target = world.add(random_adapter(world.config, seed=1, ranks=[2], base_id="sha256:" + "1" * 64), "stranger")

    engine = world.engine(merge=target, allow_base_mismatch=True)
    engine.close()

    with world.registry as registry:
        (noted,) = registry.mismatches(registry.resolve("stranger"))
    assert noted.base_id == engine.ready.base_id
