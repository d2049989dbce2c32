"""Several adapters as one, and its certificate; numpy in float64 and PEFT are the judges."""

import numpy as np
import pytest
import torch

from flora.adapter import Adapter, make_adapter
from flora.algebra.combine import Combination, Term, dense
from flora.algebra.merge import merge_adapters
from flora.algebra.parts import Part, check_weights
from flora.algebra.recombine import difference_squared, product_norm_squared
from flora.errors import BaseMismatch, UsageError
from flora.identity import base_record
from flora.lowrank import LowRank
from flora.rank import RankRule
from tests.extract.models import build, save

WEIGHTS = (0.7, -0.4)
NO_RULE = RankRule()


@pytest.fixture(scope="module")
def record(base):
    return base_record(base)


def merge(adapters, base, record, method="svd", rule=NO_RULE, weights=WEIGHTS, **options):
    parts = [
        Part(one, weight, f"sha256:{letter * 64}", letter)
        for one, weight, letter in zip(adapters, weights, "abc", strict=False)
    ]
    return merge_adapters(parts, base, record, Combination(method, **options), rule)


def product(factors: LowRank) -> np.ndarray:
    return factors.scale * factors.B.double().numpy() @ factors.A.double().numpy()


def wanted_sum(adapters, name, weights=WEIGHTS) -> np.ndarray:
    return sum(weight * product(one.factors[name]) for one, weight in zip(adapters, weights, strict=True))


def test_a_merge_is_the_weighted_sum_but_for_the_rounding_of_its_factors(adapters, base, record):
    merged = merge(adapters, base, record)

    assert len(merged.adapter.factors) == 14
    for module, factors in merged.adapter:
        wanted = wanted_sum(adapters, module.name)
        assert module.rank == np.linalg.matrix_rank(wanted, tol=1e-6 * np.linalg.norm(wanted)) == 14
        assert np.linalg.norm(product(factors) - wanted) < 5e-3 * np.linalg.norm(wanted)


def test_the_certificate_is_numpys(adapters, base, record):
    merged = merge(adapters, base, record)

    changes = merged.adapter.report.by_name()
    lost = total = 0.0
    for module, factors in merged.adapter:
        wanted = wanted_sum(adapters, module.name)
        residual = np.square(product(factors) - wanted).sum()
        change = changes[f"{module.name}.weight"]
        assert change.norm_squared == pytest.approx(np.square(wanted).sum(), rel=1e-10)
        assert change.norm_squared - change.kept == pytest.approx(residual, rel=1e-6)
        lost, total = lost + residual, total + np.square(wanted).sum()
    assert merged.distance == pytest.approx((lost / total) ** 0.5, rel=1e-6)


def test_a_merge_cut_to_a_rank_is_the_best_of_that_rank(adapters, base, record):
    cut = merge(adapters, base, record, rule=RankRule(max_rank=3)).adapter

    for module, factors in cut:
        wanted = wanted_sum(adapters, module.name)
        squares = np.square(np.linalg.svd(wanted, compute_uv=False))
        residual = np.square(product(factors) - wanted).sum()
        assert module.rank == 3
        assert residual == pytest.approx(squares[3:].sum(), rel=1e-3)
        change = cut.report.by_name()[f"{module.name}.weight"]
        assert change.kept == pytest.approx(squares.sum() - residual, rel=1e-9)


def test_a_budget_that_leaves_a_module_nothing_says_so(adapters, base, record):
    cut = merge(adapters, base, record, rule=RankRule(budget_bytes=1500))

    changes = cut.adapter.report.by_name()
    gone = [name for name in adapters[0].factors if name not in cut.adapter.factors]
    assert gone
    assert all(changes[f"{name}.weight"].kept == pytest.approx(0, abs=1e-12) for name in gone)
    assert sum(factors.num_bytes for factors in cut.adapter.factors.values()) <= 1500


def test_an_energy_holds_for_every_module(adapters, base, record):
    cut = merge(adapters, base, record, rule=RankRule(energy=0.9)).adapter

    assert all(change.kept >= 0.9 * change.norm_squared for change in cut.report.tensors)
    assert cut.header.max_rank < 14


def test_a_merge_carries_its_lineage_and_its_recipe(adapters, base, record):
    header = merge(adapters, base, record, "dare", RankRule(max_rank=4), density=0.5, seed=9).adapter.header

    assert header.recipe.operation == "merge"
    assert header.recipe.method == "dare"
    assert header.recipe.parents == ("sha256:" + "a" * 64, "sha256:" + "b" * 64)
    assert header.recipe.options == {"weights": "0.7,-0.4", "density": 0.5, "seed": 9, "rank": 4}
    assert header.base.base_id == str(record.base_id)
    assert set(header.base.touched) == {f"{module.name}.weight" for module in header.modules}


def test_merging_one_adapter_changes_nothing(adapters, base, record):
    merged = merge(adapters[:1], base, record, weights=(1.0,)).adapter

    for name, factors in merged.factors.items():
        assert difference_squared(factors, adapters[0].factors[name]) < 1e-4 * product_norm_squared(factors)


def test_an_adapter_less_itself_is_nothing(adapters, base, record):
    merged = merge([adapters[0], adapters[0]], base, record, weights=(1.0, -1.0))

    assert all(float(product_norm_squared(factors)) < 1e-20 for factors in merged.adapter.factors.values())


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_ties_and_dare_are_certified_against_their_own_result(adapters, base, record, method):
    merged = merge(adapters, base, record, method, RankRule(max_rank=10), density=0.4)

    for module, factors in merged.adapter:
        terms = [Term(one.factors[module.name], weight) for one, weight in zip(adapters, WEIGHTS, strict=True)]
        wanted = dense(terms, Combination(method, 0.4), module.name).double().numpy()
        residual = np.square(product(factors) - wanted).sum()
        best = np.square(np.linalg.svd(wanted, compute_uv=False))[10:].sum()
        found = merged.modules[module.name]
        assert module.rank == 10
        assert found.norm_squared == pytest.approx(np.square(wanted).sum(), rel=1e-6)
        assert found.residual_squared == pytest.approx(residual, rel=1e-3)
        assert best <= residual * (1 + 1e-9) <= 1.01 * best
        apart = np.square(product(factors) - wanted_sum(adapters, module.name)).sum()
        assert found.distance_squared == pytest.approx(apart, rel=1e-6)


def test_linear_says_how_far_it_is_from_the_sum(base, record, adapters):
    pair = [merge([one], base, record, rule=RankRule(max_rank=4), weights=(1.0,)).adapter for one in adapters]

    merged = merge(pair, base, record, "linear", weights=(0.5, 0.5))

    assert merged.adapter.header.max_rank == 4
    assert merged.distance > 0.3  # terms of one's B with the other's A
    for module, factors in merged.adapter:
        wanted = wanted_sum(pair, module.name, (0.5, 0.5))
        apart = np.square(product(factors) - wanted).sum()
        assert merged.modules[module.name].distance_squared == pytest.approx(apart, rel=1e-6)


def test_a_module_that_only_one_adapter_has_is_merged_too(adapters, base, record):
    name = "model.layers.0.mlp.up_proj"
    header = adapters[1].header
    part = make_adapter({name: adapters[1].factors[name]}, header.base, header.recipe)

    merged = merge([adapters[0], part], base, record)

    alone = "model.layers.0.mlp.down_proj"
    apart = np.linalg.norm(product(merged.adapter.factors[alone]) - 0.7 * product(adapters[0].factors[alone]))
    assert len(merged.adapter.factors) == 14
    assert apart < 5e-3 * np.linalg.norm(product(adapters[0].factors[alone]))


def test_the_first_adapters_template_is_kept_and_the_others_named(adapters, base, record):
    def with_template(adapter: Adapter, text: bytes) -> Adapter:
        return make_adapter(
            adapter.factors, adapter.header.base, adapter.header.recipe, extras={"chat_template.jinja": text}
        )

    merged = merge([with_template(adapters[0], b"one"), with_template(adapters[1], b"two")], base, record)

    assert merged.adapter.extras["chat_template.jinja"] == b"one"
    assert merged.notes == ("chat_template.jinja of b differs from that of a, which is kept",)


def test_adapters_of_another_base_are_refused(adapters, tmp_path):
    other = save(build("llama", seed=9), tmp_path / "other", torch.bfloat16)

    with pytest.raises(BaseMismatch, match="a was made for another base"):
        merge(adapters, other, base_record(other))


def test_adapters_of_other_shapes_are_refused(adapters, base, record):
    name = "model.layers.0.mlp.up_proj"
    odd = LowRank(A=torch.randn(2, 3), B=torch.randn(5, 2))
    foreign = make_adapter({name: odd}, adapters[0].header.base, adapters[0].header.recipe)

    with pytest.raises(BaseMismatch, match=rf"{name} is \[5, 3\] in b, \[96, 64\] in another"):
        merge([adapters[0], foreign], base, record)


def test_weights_are_one_each_or_one_for_each():
    assert check_weights([], 3) == [1.0, 1.0, 1.0]
    assert check_weights([0.5, 2.0], 2) == [0.5, 2.0]
    for bad in ([1.0], [1.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(UsageError):
            check_weights(bad, 2)
