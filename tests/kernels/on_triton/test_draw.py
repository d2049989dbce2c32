"""Draws on the device: the tokens that the sampler draws in float64, whoever else is drawn."""

import pytest
import torch

from flora.kernels.draw import draw_tokens
from flora.serve.engine.cuda.sampler import pack_draws, top_logprobs
from flora.serve.engine.philox import uniform
from flora.serve.engine.sampler import Draw, draw_token, token_logprobs
from flora.serve.request import SamplingParams

CUTS = {4: {"top_k": 4}, 3: {"top_k": 6, "top_p": 0.5}}  # by how many of six equal tokens they keep
VOCAB, COLUMNS = 1003, 8  # 63 groups of 16 tokens, the last not full, and two tiles of each


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """bf16 in the interpreter too: nothing here is a matrix product, which it gets wrong."""
    return request.param


def sampling(**fields: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 1, "temperature": 1.0} | fields)  # type: ignore[arg-type]


def rows_of_logits(
    count: int, dtype: torch.dtype, device: torch.device, seed: int = 0, vocab: int = VOCAB
) -> torch.Tensor:
    """As a model has them: a few likely tokens, and in half precision many equal ones."""
    return (2 * torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed))).to(dtype).to(device)


def drawn(logits: torch.Tensor, draws: list[Draw], columns: int | None = COLUMNS) -> list[int]:
    likeliest = logits.max(-1)
    tokens = likeliest.indices.clone()
    draw_tokens(logits, likeliest.values, tokens, pack_draws(asked(draws), logits.device), columns=columns)
    return tokens.tolist()


def asked(draws: list[Draw]) -> list[tuple[int, Draw]]:
    """As the runner asks: of rows that want no more than their likeliest token it says nothing."""
    return [(row, draw) for row, draw in enumerate(draws) if not draw.sampling.asks_likeliest]


def in_float64(logits: torch.Tensor, draws: list[Draw]) -> list[int]:
    return [
        int(row.argmax()) if draw.sampling.is_greedy else draw_token(row, draw.sampling, number_of(draw))
        for row, draw in zip(logits.float().cpu(), draws, strict=True)
    ]


def number_of(draw: Draw) -> float:
    return uniform(draw.sampling.seed, draw.index)


@pytest.mark.parametrize("top_k", [None, 1, 50, 600, VOCAB, 5 * VOCAB])  # 600: more than a tile has places
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
def test_it_is_the_samplers_token(device, dtype, top_p, top_k):
    wanted = zip((0.0, 0.3, 1.0, 1.0, 2.0, 2.0), (0, 7, -1, 2**63 - 1, -(2**63), 3), strict=True)
    draws = [
        Draw(sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed), 40 * i)
        for i, (temperature, seed) in enumerate(wanted)
    ]
    logits = rows_of_logits(len(draws), dtype, device)

    assert drawn(logits, draws) == in_float64(logits, draws)


@pytest.mark.parametrize("vocab", [1, 5, 63, 64, 65, 4096, 8205])
def test_it_is_so_for_any_vocabulary(device, dtype, vocab):
    """Tiles of the usual size: several of each group only in the largest."""
    cuts: tuple[dict[str, object], ...] = ({}, {"top_p": 0.7}, {"top_k": 40}, {"top_k": 60, "top_p": 0.9})
    draws = [Draw(sampling(seed=3 * i + 1, **cuts[i % 4]), i) for i in range(8)]
    logits = rows_of_logits(len(draws), dtype, device, seed=vocab, vocab=vocab)

    assert drawn(logits, draws, columns=None) == in_float64(logits, draws)


@pytest.mark.parametrize("top_p", [1e-9, 0.01, 0.999, 1 - 1e-9])
def test_a_cut_may_keep_next_to_nothing_or_nearly_all(device, dtype, top_p):
    draws = [Draw(sampling(seed=i, top_p=top_p, top_k=(None, 200)[i % 2]), i) for i in range(4)]
    logits = rows_of_logits(len(draws), dtype, device)

    assert drawn(logits, draws) == in_float64(logits, draws)


@pytest.mark.parametrize("cut", [{"top_k": 500}, {"top_p": 0.5}, {"top_k": 600, "top_p": 0.8}], ids=str)
def test_a_bound_may_be_on_either_side_of_zero(device, dtype, cut):
    """Numbers below zero fall as their bits rise."""
    draws = [Draw(sampling(seed=i, **cut), i) for i in range(6)]
    logits = rows_of_logits(len(draws), dtype, device)
    shifts = torch.tensor([-0.02, -0.001, 0.0, 0.001, 0.02, -9.0], device=device)[:, None]
    logits = (0.01 * logits.float() + shifts).to(dtype)

    assert drawn(logits, draws) == in_float64(logits, draws)


def test_zero_and_minus_zero_are_one_number(device, dtype):
    """Of both the first tokens stay: in a cut they are equal ones."""
    logits = torch.full((1, VOCAB), -40.0, dtype=dtype, device=device)
    zeros = [7, 15, 16, 17, 640, 1001]
    logits[0, zeros] = torch.tensor([0.0, -0.0, -0.0, 0.0, -0.0, 0.0], dtype=dtype, device=device)
    four, three = ([Draw(sampling(seed=seed, **cut), 0) for seed in seeds_of(count)] for count, cut in CUTS.items())

    assert drawn(logits.expand(4, -1).contiguous(), four) == zeros[:4]
    assert drawn(logits.expand(3, -1).contiguous(), three) == zeros[:3]


def test_its_random_numbers_are_philoxs(device):
    """Of equal tokens the number's share of the vocabulary is drawn."""
    draws = [Draw(sampling(seed=seed), index) for seed in (0, 1, -3, 2**62 + 5) for index in (0, 1, 1000, 2**31)]

    tokens = drawn(torch.zeros(len(draws), VOCAB, device=device), draws)

    assert tokens == [int(number_of(draw) * VOCAB) for draw in draws]
    assert len(set(tokens)) > 10


def test_of_equal_tokens_at_a_bound_those_of_lower_number_stay(device, dtype):
    logits = torch.full((1, VOCAB), -3.0, dtype=dtype, device=device)
    equal = [2, 255, 256, 300, 900, 1002]
    logits[0, equal] = 1.0
    four, three = ([Draw(sampling(seed=seed, **cut), 0) for seed in seeds_of(count)] for count, cut in CUTS.items())

    assert drawn(logits.expand(4, -1).contiguous(), four) == equal[:4]
    assert drawn(logits.expand(3, -1).contiguous(), three) == equal[:3]


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.7, 0.5])
def test_top_p_goes_on_from_the_ties_that_top_k_kept(device, dtype, top_p):
    """One likely token and four of eight equal ones: e parts of e + 4, and one each. It keeps 5, 5, 3 or 2 of them."""
    logits = torch.full((1, VOCAB), -3.0, dtype=dtype, device=device)
    equal = [2, 255, 256, 300, 500, 501, 900, 1002]
    logits[0, equal], logits[0, 700] = 1.0, 2.0
    every = [Draw(sampling(seed=seed, top_k=5, top_p=top_p), 0) for seed in range(24)]
    first = dict(reversed(list(zip(in_float64(logits.expand(len(every), -1).contiguous(), every), every, strict=True))))
    assert set(first) == {700, *equal[: {1.0: 4, 0.9: 4, 0.7: 2, 0.5: 1}[top_p]]}

    tokens = drawn(logits.expand(len(first), -1).contiguous(), list(first.values()))

    assert tokens == list(first)


def seeds_of(count: int) -> list[int]:
    """One whose number lies in each of so many equal parts of [0, 1)."""
    parts = {int(uniform(seed, 0) * count): seed for seed in range(100)}
    return [parts[i] for i in range(count)]


def test_what_cannot_be_is_never_drawn(device, dtype):
    logits = torch.full((12, VOCAB), -float("inf"), dtype=dtype, device=device)
    logits[:, [500, 777]] = 0.0
    cuts = ({}, {"top_p": 0.99}, {"top_k": 900})
    draws = [Draw(sampling(seed=seed, **cuts[seed % 3]), 0) for seed in range(12)]

    assert set(drawn(logits, draws)) == {500, 777}


@pytest.mark.parametrize("temperature", [1e-300, 1e-9])
def test_a_tiny_temperature_does_not_overflow(device, dtype, temperature):
    logits = rows_of_logits(4, dtype, device)
    draws = [Draw(sampling(temperature=temperature, top_p=(1.0, 0.5)[i % 2], seed=i), 0) for i in range(4)]

    values = logits.gather(1, torch.tensor(drawn(logits, draws), device=device)[:, None])[:, 0]

    assert torch.equal(values, logits.max(-1).values)


def test_a_huge_temperature_draws_of_all_that_can_be(device, dtype):
    logits = rows_of_logits(4, dtype, device)
    logits[:, 10:900] = -float("inf")
    draws = [Draw(sampling(temperature=1e300, top_p=(1.0, 0.5)[i % 2], seed=i), 0) for i in range(4)]

    assert drawn(logits, draws, columns=None) == in_float64(logits, draws)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_gets_some_token_and_the_others_theirs(device, dtype, bad):
    """The next step may embed it before it is found out."""
    logits = rows_of_logits(3, dtype, device)
    logits[1] = bad
    draws = [Draw(sampling(seed=seed, top_k=9, top_p=0.8, logprobs=1), 0) for seed in range(3)]

    first, some, third = drawn(logits, draws)

    assert 0 <= some < VOCAB
    assert [first, third] == in_float64(logits[::2], draws[::2])


def test_a_draw_is_the_same_in_any_batch(device, dtype):
    draws = [Draw(sampling(seed=i, top_p=0.8, top_k=(None, 30)[i % 2], temperature=i / 2), 7 * i) for i in range(5)]
    logits = rows_of_logits(5, dtype, device)
    together = drawn(logits, draws)

    assert [drawn(logits[i : i + 1], draws[i : i + 1])[0] for i in range(5)] == together
    assert drawn(logits.flip(0).contiguous(), draws[::-1]) == together[::-1]


def test_rows_that_ask_for_nothing_are_left_alone(device, dtype):
    logits = rows_of_logits(4, dtype, device)
    tokens = torch.tensor([-5, -6, -7, -8], device=device)
    greedy, drawn_one = sampling(temperature=0.0, logprobs=1), sampling(seed=3)
    packed = pack_draws([(1, Draw(drawn_one, 0)), (2, Draw(greedy, 0))], device)

    log_sums = draw_tokens(logits, logits.amax(-1), tokens, packed, columns=COLUMNS)

    assert tokens.tolist() == [-5, *in_float64(logits[1:2], [Draw(drawn_one, 0)]), -7, -8]
    assert [bool(log_sum) for log_sum in log_sums] == [False, False, True, False]


def test_where_no_row_asks_nothing_is_launched(device):
    logits = torch.zeros(2, VOCAB, device=device)
    tokens = torch.tensor([-5, -6], device=device)

    assert not draw_tokens(logits, logits.amax(-1), tokens, pack_draws([], device)).any()
    assert tokens.tolist() == [-5, -6]


def test_log_probabilities_are_of_the_models_own_distribution_and_of_each_row_alone(device, dtype):
    wanted = [None, 3, 0, 20, 2 * VOCAB]
    draws = [Draw(sampling(temperature=(0.0, 0.7)[i % 2], top_k=5, logprobs=top), i) for i, top in enumerate(wanted)]
    logits = rows_of_logits(len(draws), dtype, device)

    def found(first: int, end: int) -> list[tuple[float, list[int], list[float]]]:
        tokens = torch.tensor(drawn(logits[first:end], draws[first:end]), device=device)
        packed = pack_draws(asked(draws[first:end]), device)
        log_sums = draw_tokens(logits[first:end], logits[first:end].amax(-1), tokens, packed)
        told = top_logprobs(logits[first:end], tokens, log_sums, asked(draws[first:end]))
        assert told is not None
        parts = zip(told.num_top, told.chosen.tolist(), told.ids.tolist(), told.values.tolist(), strict=True)
        return [(chosen, ids[:count], values[:count]) for count, chosen, ids, values in parts]

    together = found(0, len(draws))

    assert len(together) == 4
    for row, (chosen, ids, values) in enumerate(together, start=1):
        theirs = token_logprobs(logits[row].float().cpu(), drawn(logits, draws)[row], wanted[row])
        assert chosen == pytest.approx(theirs.chosen, abs=2e-6)
        assert values == pytest.approx(theirs.top, abs=2e-6)
        assert logits[row, ids].tolist() == logits[row, list(theirs.top_ids)].tolist()
        assert ids == sorted(ids, key=lambda token: (-float(logits[row, token]), token))
        assert found(row, row + 1) == [together[row - 1]]


def test_nobody_wants_log_probabilities(device):
    logits = torch.zeros(1, VOCAB, device=device)

    assert top_logprobs(logits, logits.argmax(-1), logits[:, 0], [(0, Draw(sampling(), 0))]) is None
