"""Neighbours never matter: a row's logits are the same bits alone and in any company."""

import random

import pytest
import torch
from torch import Tensor

from flora.serve.engine import Engine
from flora.serve.messages import LoadAdapter
from flora.serve.request import AdapterTarget, SamplingParams
from tests.conftest import IS_FULL
from tests.serve.engine.adapters import random_adapter
from tests.serve.engine.bases import VOCAB
from tests.serve.engine.worlds import LogitsTap, World, ask, run_to_end

FAMILIES = ("llama", "qwen3", "smollm2-135m", "qwen2.5-0.5b")
WATCHED = SamplingParams(max_tokens=6, temperature=0.0)


def prompt_of(num_tokens: int, seed: int = 0) -> list[int]:
    seeded = random.Random(seed)
    return [seeded.randrange(VOCAB) for _ in range(num_tokens)]


def bits(logits: Tensor) -> Tensor:
    return logits.view(torch.int32)


def watched_logits(
    engine: Engine,
    prompt: list[int],
    target: AdapterTarget | None,
    neighbours: list[tuple[list[int], AdapterTarget | None]] = (),  # type: ignore[assignment]
) -> Tensor:
    """The bits of a request's logits, int32 [tokens, vocab_size], with these neighbours in flight."""
    tap = LogitsTap(engine)
    half = len(neighbours) // 2
    for i, (neighbour, adapter) in enumerate(neighbours[:half]):
        ask(engine, f"before{i}", neighbour, adapter, SamplingParams(max_tokens=9, temperature=1.0, seed=i))
    ask(engine, "watched", prompt, target, WATCHED)
    for i, (neighbour, adapter) in enumerate(neighbours[half:]):
        ask(engine, f"after{i}", neighbour, adapter, SamplingParams(max_tokens=9, temperature=1.0, seed=i))
    answers = run_to_end(engine)
    assert answers["watched"].finish_reason == "length"
    return bits(tap.of("watched"))


def make_resident(engine: Engine, target: AdapterTarget) -> None:
    engine.load_adapter(LoadAdapter(request_id="load", adapter=target))
    run_to_end(engine)


def fill_with_nan(engine: Engine, target: AdapterTarget) -> None:
    """Straight into the adapter's pages: a load would refuse such weights."""
    resident = engine.residency.get(target.serving_digest)
    assert resident is not None
    engine.runner.pool.poison(resident.pages)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_bit_equal_alone_and_among_any_neighbours(bases, tmp_path, family, num_threads):
    world = World(bases(family), tmp_path)
    targets = [None] + [world.add(random_adapter(world.config, seed), f"a{seed}") for seed in range(1, 5)]
    broken = world.add(random_adapter(world.config, seed=9, absent=0.0), "broken")
    engine = world.engine(num_threads=num_threads, max_batch_tokens=64)
    seeded = random.Random(7)

    for target in targets[:3]:
        prompt = prompt_of(21)
        alone = watched_logits(engine, prompt, target)
        for _ in range(3 if IS_FULL else 2):
            make_resident(engine, broken)
            fill_with_nan(engine, broken)
            neighbours = [
                (prompt_of(seeded.randrange(1, 90), seeded.random()), seeded.choice([*targets, broken]))
                for _ in range(seeded.randrange(1, 12))
            ]
            assert torch.equal(watched_logits(engine, prompt, target, neighbours), alone)
    engine.close()


def test_base_rows_are_bit_equal_to_those_of_an_engine_without_adapters(world):
    plain = world.engine(poison=False)
    expected = watched_logits(plain, prompt_of(40), None)
    plain.close()

    targets = [world.add(random_adapter(world.config, seed), f"a{seed}") for seed in range(4)]
    mixed = world.engine()
    neighbours = [(prompt_of(n, n), target) for n, target in zip((3, 17, 50, 64), targets, strict=True)]

    assert torch.equal(watched_logits(mixed, prompt_of(40), None, neighbours), expected)
    mixed.close()


@pytest.mark.parametrize("max_batch_tokens", [1, 7, 16, 64])
def test_a_prompt_in_chunks_gives_the_bits_of_a_prompt_in_one_piece(world, max_batch_tokens):
    target = world.add(random_adapter(world.config, seed=1), "a")
    whole, chunked = world.engine(), world.engine(max_batch_tokens=max_batch_tokens)

    for adapter in (None, target):
        expected = watched_logits(whole, prompt_of(70), adapter)
        assert torch.equal(watched_logits(chunked, prompt_of(70), adapter), expected)
    whole.close()
    chunked.close()


@pytest.mark.parametrize("page_tokens", [4, 16, 48])
def test_the_size_of_a_page_changes_no_bit(world, page_tokens):
    target = world.add(random_adapter(world.config, seed=1), "a")
    usual, other = world.engine(), world.engine(page_tokens=page_tokens)

    expected = watched_logits(usual, prompt_of(70), target)
    assert torch.equal(watched_logits(other, prompt_of(70), target), expected)
    usual.close()
    other.close()


def test_equal_adapters_in_other_pages_and_slots_give_the_same_bits(world):
    target = world.add(random_adapter(world.config, seed=1), "a")
    others = [world.add(random_adapter(world.config, seed), f"a{seed}") for seed in (2, 3)]
    first, second = world.engine(), world.engine()
    for other in others:
        make_resident(second, other)

    expected = watched_logits(first, prompt_of(30), target)
    assert torch.equal(watched_logits(second, prompt_of(30), target), expected)
    assert first.residency.get(target.serving_digest).slot != second.residency.get(target.serving_digest).slot
    first.close()
    second.close()


def test_nan_weights_of_an_adapter_end_its_own_requests_with_an_error(world):
    target = world.add(random_adapter(world.config, seed=1, absent=0.0), "a")
    engine = world.engine()
    make_resident(engine, target)
    fill_with_nan(engine, target)

    ask(engine, "broken", prompt_of(5), target)
    ask(engine, "sound", prompt_of(5))
    answers = run_to_end(engine)
    engine.close()

    assert answers["broken"].finish_reason == "error"
    assert "not finite" in answers["broken"].events[-1].error
    assert answers["sound"].finish_reason == "length"
