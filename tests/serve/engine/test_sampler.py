"""Which token is drawn, with what probability, and that a draw depends on nothing else."""

import numpy as np
import pytest
import torch

from flora.serve.engine.philox import philox, uniform
from flora.serve.engine.sampler import Draw, draw_token, sample, token_logprobs
from flora.serve.request import SamplingParams

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0, -float("inf")])  # likeliest first: 1, 2, 0, 3; 4 is impossible


def sampling(**fields: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 1, "temperature": 1.0} | fields)  # type: ignore[arg-type]


def drawn_tokens(params: SamplingParams, num_draws: int = 200) -> set[int]:
    return {draw_token(LOGITS, params, u) for u in np.linspace(0, 1, num_draws, endpoint=False)}


def agrees(observed: np.ndarray, expected: np.ndarray) -> bool:
    """Pearson's chi-square, within five standard deviations of its mean: [bins], [bins], expected at least 5 each."""
    freedom = len(expected) - 1
    return float(((observed - expected) ** 2 / expected).sum()) < freedom + 5 * (2 * freedom) ** 0.5


# --- random numbers ---


@pytest.mark.parametrize("key", [0, 1, 12345, 2**64 - 1])
def test_philox_agrees_with_numpy(key):
    counter = np.array([41, 0, 0, 0], dtype=np.uint64)  # numpy counts up before it draws
    theirs = np.random.Philox(key=np.array([key, 0], dtype=np.uint64), counter=counter).random_raw(4)

    assert philox(key, 42) == tuple(int(word) for word in theirs)


def test_uniform_numbers_are_uniform():
    numbers = np.array([uniform(seed, index) for seed in range(50) for index in range(200)])

    assert 0 <= numbers.min() < numbers.max() < 1
    assert agrees(np.histogram(numbers, bins=50, range=(0, 1))[0], np.full(50, len(numbers) / 50))


def test_a_number_depends_on_seed_and_index():
    assert len({uniform(seed, index) for seed in range(20) for index in range(20)}) == 400
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)


# --- draws ---


def test_temperature_zero_takes_the_likeliest():
    [drawn] = sample(LOGITS[None], [Draw(sampling(temperature=0.0), 0)])

    assert drawn.token == 1


def test_a_draw_walks_the_running_sum_of_probabilities():
    probabilities = LOGITS.softmax(0).tolist()

    assert draw_token(LOGITS, sampling(), 0.0) == 0
    assert draw_token(LOGITS, sampling(), probabilities[0] - 1e-6) == 0
    assert draw_token(LOGITS, sampling(), probabilities[0] + 1e-6) == 1
    assert draw_token(LOGITS, sampling(), 1 - 2**-53) == 3


def test_an_impossible_token_is_never_drawn():
    assert drawn_tokens(sampling(), 5000) == {0, 1, 2, 3}
    first_impossible = torch.tensor([-float("inf"), 0.0])
    assert draw_token(first_impossible, sampling(), 0.0) == 1


def test_top_k_keeps_the_k_likeliest():
    assert drawn_tokens(sampling(top_k=1)) == {1}
    assert drawn_tokens(sampling(top_k=2)) == {1, 2}
    assert drawn_tokens(sampling(top_k=1000)) == {0, 1, 2, 3}


def test_top_p_keeps_the_fewest_that_reach_p():
    p1, p2 = LOGITS.softmax(0)[[1, 2]].tolist()

    assert drawn_tokens(sampling(top_p=p1 - 0.01)) == {1}
    assert drawn_tokens(sampling(top_p=p1 + 0.01)) == {1, 2}
    assert drawn_tokens(sampling(top_p=p1 + p2 + 0.01)) == {0, 1, 2}
    assert drawn_tokens(sampling(top_p=1e-9)) == {1}


def test_top_p_is_of_what_temperature_and_top_k_left():
    """With the two likeliest kept, the first of them has 0.73 of what is left, and 0.64 of the whole."""
    assert drawn_tokens(sampling(top_k=2, top_p=0.7)) == {1}
    hot = (LOGITS / 10).softmax(0)
    assert drawn_tokens(sampling(temperature=10.0, top_p=float(hot[1]) + 0.01)) == {1, 2}


@pytest.mark.parametrize("spread", [0.1, 2.0, 30.0])
@pytest.mark.parametrize("params", [{"top_k": 7}, {"top_p": 0.6}, {"top_p": 0.999}, {"top_k": 300, "top_p": 0.9}])
def test_the_cuts_keep_what_a_sort_of_all_tokens_says(params, spread):
    """Every token's share of the draws, from numbers all over [0, 1); of bf16 logits, many of which are equal."""
    logits = (torch.randn(500, generator=torch.Generator().manual_seed(3)) * spread).bfloat16().float()
    weights = (logits - logits.max()).double().exp()
    order = logits.sort(descending=True, stable=True).indices[: params.get("top_k", 500)]
    sums = weights[order].cumsum(0)
    kept = order[sums - weights[order] < params.get("top_p", 1.0) * sums[-1]]
    heavy = kept[weights[kept] > 2e-3 * weights[kept].sum()]

    drawn = {draw_token(logits, sampling(**params), u) for u in np.linspace(0, 1, 2000, endpoint=False)}

    assert drawn <= set(kept.tolist())
    assert set(heavy.tolist()) <= drawn


def test_a_tiny_temperature_does_not_overflow():
    assert drawn_tokens(sampling(temperature=1e-9)) == {1}


@pytest.mark.parametrize("params", [sampling(temperature=0.7), sampling(top_k=20, top_p=0.9)], ids=["plain", "cut"])
def test_tokens_come_as_often_as_transformers_says(params):
    """Judge: transformers' own warpers give the distribution; 20,000 draws must not be improbable under it."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(100, generator=torch.Generator().manual_seed(5)) * 2
    scores = TemperatureLogitsWarper(params.temperature)(None, logits[None])
    if params.top_k:
        scores = TopPLogitsWarper(params.top_p)(None, TopKLogitsWarper(params.top_k)(None, scores))
    probabilities = scores.softmax(-1)[0].double().numpy()

    num_draws = 20_000
    drawn = [draw_token(logits, params, uniform(3, index)) for index in range(num_draws)]
    counts = np.bincount(drawn, minlength=100)

    assert counts[probabilities == 0].sum() == 0
    common = probabilities * num_draws >= 5
    observed, expected = counts[common], probabilities[common] * num_draws
    assert agrees(observed, expected * observed.sum() / expected.sum())


def test_a_draw_is_the_same_in_any_batch():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(9, 1003, generator=generator)
    draws = [Draw(sampling(seed=i, top_p=0.8, logprobs=3), index=7 * i) for i in range(9)]
    together = sample(logits, draws)

    for row in range(9):
        assert sample(logits[row : row + 1], draws[row : row + 1]) == [together[row]]
    assert sample(logits.flip(0), draws[::-1]) == together[::-1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_give_no_token(bad):
    logits = torch.stack([LOGITS, LOGITS])
    logits[1, 2] = bad

    first, second = sample(logits, [Draw(sampling(temperature=0.0), 0)] * 2)

    assert (first.token, second.token) == (1, None)


# --- log probabilities ---


def test_logprobs_are_of_the_models_own_distribution():
    [drawn] = sample(LOGITS[None], [Draw(sampling(temperature=0.0, top_k=1, logprobs=2), 0)])

    expected = LOGITS.log_softmax(0)
    assert drawn.logprobs.chosen == pytest.approx(float(expected[1]))
    assert drawn.logprobs.top_ids == (1, 2)
    assert drawn.logprobs.top == pytest.approx((float(expected[1]), float(expected[2])))


def test_the_chosen_token_has_its_logprob_even_where_it_is_not_among_the_likeliest():
    assert token_logprobs(LOGITS, 3, 1).chosen == pytest.approx(float(LOGITS.log_softmax(0)[3]))


def test_no_alternatives_are_given_where_none_were_asked_for():
    assert token_logprobs(LOGITS, 1, 0).top_ids == ()
    [drawn] = sample(LOGITS[None], [Draw(sampling(logprobs=None), 0)])
    assert drawn.logprobs is None
