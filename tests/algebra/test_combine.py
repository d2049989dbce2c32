"""Several changes as one: PEFT's own merging functions and numpy in float64 are the judges."""

import numpy as np
import pytest
import torch
from peft.utils.merge_utils import ties as peft_ties

from flora.algebra.combine import Combination, Term, dense, exact_sum, linear_sum
from flora.errors import UsageError
from flora.lowrank import LowRank


def term(seed: int, rank: int, weight: float = 1.0, scale: float = 1.0, shape=(40, 30)) -> Term:
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator)
    return Term(LowRank(A=A, B=B, scale=scale), weight)


def numpy_delta(one: Term) -> np.ndarray:
    """weight * scale * B @ A in float64."""
    factors = one.factors
    return one.weight * factors.scale * factors.B.double().numpy() @ factors.A.double().numpy()


TERMS = [term(1, 4, weight=0.7, scale=2.0), term(2, 6, weight=-0.4), term(3, 1, weight=1.5, scale=0.5)]


def test_the_exact_sum_is_numpys_whatever_the_ranks_scales_and_signs():
    total = exact_sum(TERMS)

    wanted = sum(numpy_delta(one) for one in TERMS)
    assert total.rank == 11
    np.testing.assert_allclose((total.B @ total.A).numpy(), wanted, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(dense(TERMS, Combination("svd"), "w").numpy(), wanted, rtol=1e-4, atol=1e-4)


def test_linear_is_pefts(tmp_path):
    """PEFT's add_weighted_adapter with combination_type="linear", on a model of one layer."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(30, 40, bias=False))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
    peft = get_peft_model(model, config, adapter_name="first")
    peft.add_adapter("second", config)
    peft.add_weighted_adapter(["first", "second"], [0.7, -0.4], "both", combination_type="linear")
    layer = peft.base_model.model[0]

    terms = [
        Term(LowRank(layer.lora_A[one].weight.data, layer.lora_B[one].weight.data, scale=2.0), weight)
        for one, weight in (("first", 0.7), ("second", -0.4))
    ]

    theirs = layer.get_delta_weight("both")
    torch.testing.assert_close(linear_sum(terms).delta(), theirs, rtol=1e-4, atol=1e-5)


def test_linear_needs_equal_ranks():
    with pytest.raises(UsageError, match="ranks 1 and 6 cannot be added up"):
        linear_sum(TERMS)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.filterwarnings("ignore:The density")
def test_ties_is_pefts(density, weight):
    terms = [term(seed, 5, weight) for seed in (1, 2, 3)]

    theirs = peft_ties([one.factors.delta() for one in terms], torch.full((3,), weight), density)

    torch.testing.assert_close(dense(terms, Combination("ties", density), "w"), theirs, rtol=1e-4, atol=1e-5)


def test_ties_by_hand():
    """Trimmed to the two largest of four each; the sign of the sum decides, and only who agrees is averaged."""

    def row(*values: float) -> Term:
        return Term(LowRank(A=torch.tensor([values]), B=torch.ones(1, 1)), 1.0)

    merged = dense([row(4.0, 3.0, 0.1, 0.2), row(2.0, -5.0, 0.3, 0.1)], Combination("ties", 0.5), "w")

    assert merged.tolist() == [[3.0, -5.0, 0.0, 0.0]]


def test_dare_drops_and_scales_up_so_that_the_mean_stays():
    one = term(1, 6, shape=(300, 200))
    combination = Combination("dare", density=0.25, seed=3)

    merged = dense([one], combination, "w")

    kept = merged != 0
    assert float(kept.float().mean()) == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(merged[kept], one.factors.delta()[kept] / 0.25)
    projections = [
        float((dense([one], Combination("dare", 0.25, seed), "w") * one.factors.delta()).sum()) for seed in range(20)
    ]
    assert np.mean(projections) == pytest.approx(float(one.factors.delta().square().sum()), rel=0.02)


def test_dare_is_the_same_for_the_same_seed_and_another_for_another_seed_module_or_place():
    one = term(1, 3)

    def merged(seed=0, name="w", terms=(one,)):
        return dense(list(terms), Combination("dare", 0.5, seed), name)

    assert torch.equal(merged(), merged())
    assert not torch.equal(merged(), merged(seed=1))
    assert not torch.equal(merged(), merged(name="v"))
    twice = merged(terms=(one, one))
    assert not torch.equal(twice, 2 * merged())  # two masks, not one twice


def test_of_everything_dare_is_the_sum():
    torch.testing.assert_close(dense(TERMS, Combination("dare", 1.0), "w"), dense(TERMS, Combination("svd"), "w"))


@pytest.mark.parametrize("bad", [{"method": "average"}, {"density": 0.0}, {"density": 1.5}])
def test_what_is_no_combination_is_refused(bad):
    with pytest.raises(UsageError):
        Combination(**bad)
