"""Pruning, with numpy's full SVD in float64 and the original delta as judge."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flora.adapter import Adapter, BaseBinding, ChangeReport, Recipe, TensorChange, make_adapter, report_of_factors
from flora.errors import UsageError
from flora.lowrank import LowRank, split_svd
from flora.prune import prune
from flora.rank import RankRule

BASE = BaseBinding(name="org/tiny", base_id="sha256:" + "b" * 64)
PARENT = "sha256:" + "a" * 64
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


def spread_delta(seed: int, out_features: int, in_features: int, decay: float = 0.8) -> torch.Tensor:
    """A delta of full rank whose singular values fall by `decay`."""
    generator = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(torch.randn(out_features, out_features, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(in_features, in_features, generator=generator, dtype=torch.float64))
    k = min(out_features, in_features)
    return (U[:, :k] * decay ** torch.arange(k)) @ V[:, :k].T


def extracted(deltas: Mapping[str, torch.Tensor], rank: int, dtype: torch.dtype = torch.bfloat16) -> Adapter:
    """What extraction makes of the deltas: their leading terms as stored factors, with an exact certificate."""
    factors, changes = {}, []
    for name, delta in sorted(deltas.items()):
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        factors[name] = split_svd(U[:, :rank], S[:rank], Vh[:rank], dtype)
        norm = float(delta.square().sum())
        changes.append(
            TensorChange(
                name=f"{name}.weight",
                shape=tuple(delta.shape),
                status="extracted",
                norm_squared=norm,
                kept=norm - residual(delta, factors[name]),
                rank=rank,
            )
        )
    return make_adapter(factors, BASE, Recipe(operation="extract"), ChangeReport(tensors=tuple(changes)))


def residual(delta: torch.Tensor, factors: LowRank) -> float:
    """|delta - scale B A|² with numpy in float64."""
    product = factors.scale * factors.B.double().numpy() @ factors.A.double().numpy()
    return float(np.square(delta.double().numpy() - product).sum())


def kept_of(adapter: Adapter, module: str) -> float:
    return adapter.report.by_name()[f"{module}.weight"].kept


DELTAS = {Q: spread_delta(1, 40, 40), UP: spread_delta(2, 56, 40, decay=0.9)}


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.97])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_pruning_keeps_the_energy_with_the_rank_that_numpy_finds(energy, dtype):
    adapter = extracted(DELTAS, rank=30, dtype=dtype)

    pruned = prune(adapter, RankRule(energy=energy), PARENT)

    for module, factors in pruned:
        delta = DELTAS[module.name]
        squares = np.square(np.linalg.svd(delta.numpy(), compute_uv=False))
        share = np.cumsum(squares) / squares.sum()
        assert module.rank == int((share < energy).sum()) + 1
        certified = kept_of(pruned, module.name)
        assert certified / squares.sum() >= energy - 1e-9
        roundoff = torch.finfo(dtype).eps / 2
        assert certified == pytest.approx(
            squares.sum() - residual(delta, factors), abs=roundoff / 4 * squares.sum() + 1e-6
        )


def test_our_own_factors_are_sliced():
    adapter = extracted(DELTAS, rank=30)

    pruned = prune(adapter, RankRule(max_rank=5), PARENT)

    for module, factors in pruned:
        assert module.rank == 5
        assert torch.equal(factors.A, adapter.factors[module.name].A[:5])
        assert torch.equal(factors.B, adapter.factors[module.name].B[:, :5])


def test_pruning_twice_is_pruning_once():
    adapter = extracted(DELTAS, rank=30)

    once = prune(adapter, RankRule(energy=0.9), PARENT)
    by_steps = prune(prune(adapter, RankRule(energy=0.97), PARENT), RankRule(energy=0.9), PARENT)

    assert prune(once, RankRule(energy=0.9), PARENT) is None
    assert by_steps.header.serving_digest == once.header.serving_digest


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    foreign=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    energies=st.lists(st.floats(0.05, 1.0), min_size=2, max_size=4).map(lambda values: sorted(values, reverse=True)),
)
def test_pruning_by_steps_is_pruning_to_the_last_for_any_factors(seed, foreign, dtype, energies):
    adapter = foreign_adapter(seed, dtype) if foreign else extracted({Q: spread_delta(seed, 24, 20)}, 12, dtype)

    by_steps = adapter
    for energy in energies:
        by_steps = prune(by_steps, RankRule(energy=energy), None) or by_steps
    at_once = prune(adapter, RankRule(energy=energies[-1]), None) or adapter

    assert by_steps.header.serving_digest == at_once.header.serving_digest
    assert prune(by_steps, RankRule(energy=energies[-1]), None) is None


def foreign_adapter(seed: int, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> Adapter:
    """A trained LoRA: factors in no order, with a scale; the report is that of an import."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        Q: LowRank(
            A=torch.randn(8, 20, generator=generator).to(dtype),
            B=(torch.randn(24, 8, generator=generator) * 0.6 ** torch.arange(8)).flip(1).to(dtype),
            scale=scale,
        )
    }
    return make_adapter(factors, BASE, Recipe(operation="import"), report_of_factors(factors))


def test_foreign_factors_are_cut_where_their_own_svd_says():
    adapter = foreign_adapter(seed=4)
    product = adapter.factors[Q].delta().double()
    squares = np.square(np.linalg.svd(product.numpy(), compute_uv=False))

    pruned = prune(adapter, RankRule(energy=0.8), PARENT)

    (module,) = pruned.header.modules
    assert module.rank == int((np.cumsum(squares) / squares.sum() < 0.8).sum()) + 1
    assert residual(product, pruned.factors[Q]) == pytest.approx(squares[module.rank :].sum(), rel=1e-5)
    assert kept_of(pruned, Q) == pytest.approx(squares[: module.rank].sum(), rel=1e-6)
    assert module.scale == 1.0


def test_the_certificate_of_foreign_factors_counts_what_rounding_them_anew_loses():
    adapter = foreign_adapter(seed=4, dtype=torch.bfloat16)
    product = adapter.factors[Q].delta().double()

    pruned = prune(adapter, RankRule(max_rank=7), PARENT)

    norm = float(product.square().sum())
    assert kept_of(pruned, Q) == pytest.approx(norm - residual(product, pruned.factors[Q]), abs=1e-5 * norm)


def test_energy_is_measured_against_the_delta_and_not_against_what_the_parent_kept():
    adapter = extracted({Q: DELTAS[Q]}, rank=3)  # keeps 1 - 0.8**6 = 0.74 of it

    assert prune(adapter, RankRule(energy=0.9), PARENT) is None
    assert prune(adapter, RankRule(energy=0.7), PARENT) is None  # rank 3 is the first above 0.7
    assert prune(adapter, RankRule(energy=0.5), PARENT).header.max_rank == 2  # 1 - 0.8**4 = 0.59


def test_a_budget_is_met_and_spent_on_the_most_energy_per_byte():
    adapter = extracted(DELTAS, rank=30)
    budget = 4000

    pruned = prune(adapter, RankRule(budget_bytes=budget), PARENT)

    used = sum(factors.num_bytes for factors in pruned.factors.values())
    assert used <= budget
    assert used > budget - max(factors.bytes_per_rank for factors in pruned.factors.values())
    gains = {
        name: [value / factors.bytes_per_rank for value in np.linalg.svd(DELTAS[name].numpy(), compute_uv=False) ** 2]
        for name, factors in adapter.factors.items()
    }
    ranks = {module.name: module.rank for module in pruned.header.modules}
    last_taken = min(gains[name][rank - 1] for name, rank in ranks.items())
    first_left = max(gains[name][rank] for name, rank in ranks.items())
    assert first_left <= last_taken * 1.01  # the stored factors are rounded
    assert prune(pruned, RankRule(budget_bytes=budget), PARENT) is None


def test_every_rule_is_a_cap_of_its_own():
    adapter = extracted(DELTAS, rank=30)

    pruned = prune(adapter, RankRule(max_rank=6, energy=0.97, budget_bytes=10**9), PARENT)

    assert {module.rank for module in pruned.header.modules} == {6}


def test_a_module_pruned_to_nothing_leaves_the_adapter_and_stays_in_the_report():
    adapter = extracted({Q: DELTAS[Q], UP: DELTAS[UP] * 1e-3}, rank=4)

    pruned = prune(adapter, RankRule(budget_bytes=4 * adapter.factors[Q].bytes_per_rank), PARENT)

    assert [module.name for module in pruned.header.modules] == [Q]
    change = pruned.report.by_name()[f"{UP}.weight"]
    assert (change.rank, change.kept) == (0, 0.0)
    assert pruned.report.by_name()[f"{Q}.weight"] == adapter.report.by_name()[f"{Q}.weight"]


def test_the_lineage_names_parent_and_rule():
    adapter = extracted(DELTAS, rank=30)

    recipe = prune(adapter, RankRule(max_rank=5, energy=0.9), PARENT).header.recipe

    assert recipe.operation == "prune"
    assert recipe.parents == (PARENT,)
    assert recipe.options == {"rank": 5, "energy": 0.9}


def test_pruning_needs_a_rule_and_leaves_something():
    adapter = extracted(DELTAS, rank=4)

    with pytest.raises(UsageError):
        prune(adapter, RankRule(), PARENT)
    with pytest.raises(UsageError):
        prune(adapter, RankRule(budget_bytes=1), PARENT)


def test_an_adapter_without_a_report_is_its_own_reference():
    adapter = extracted({Q: DELTAS[Q]}, rank=10, dtype=torch.float32)
    bare = make_adapter(adapter.factors, BASE, adapter.header.recipe)

    pruned = prune(bare, RankRule(energy=0.9), None)

    assert pruned.report.kept_share == pytest.approx(1 - 0.8 ** (2 * pruned.header.max_rank), abs=0.02)
    assert pruned.header.recipe.parents == ()
