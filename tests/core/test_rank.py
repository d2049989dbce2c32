"""Choosing ranks: by energy, and by bytes over all modules."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flora.errors import UsageError
from flora.rank import RankRule, rank_for_energy, ranks_for_budget

spectra = st.lists(st.floats(0.0, 1e3), min_size=1, max_size=12).map(lambda values: sorted(values, reverse=True))


def test_rank_is_the_smallest_that_keeps_the_energy():
    singular_values = torch.tensor([4.0, 3.0])  # energies: 16/25, 25/25

    assert rank_for_energy(singular_values, norm_squared=25.0, energy=0.64) == 1
    assert rank_for_energy(singular_values, norm_squared=25.0, energy=0.65) == 2
    assert rank_for_energy(singular_values, norm_squared=25.0, energy=1.0) == 2


def test_a_truncated_spectrum_that_cannot_reach_the_energy_keeps_everything():
    assert rank_for_energy(torch.tensor([4.0, 3.0]), norm_squared=100.0, energy=0.9) == 2


def test_no_change_needs_no_rank():
    assert rank_for_energy(torch.zeros(3), norm_squared=0.0, energy=0.9) == 0


@given(spectra, st.floats(1e-3, 1.0))
def test_any_smaller_rank_would_keep_too_little(values, energy):
    squares = np.square(np.asarray(values))
    norm = float(squares.sum())
    rank = rank_for_energy(torch.tensor(values, dtype=torch.float64), norm, energy)

    if norm == 0:
        assert rank == 0
        return
    assert 1 <= rank <= len(values)
    assert squares[: rank - 1].sum() < energy * norm * (1 + 1e-12)
    assert rank == len(values) or squares[:rank].sum() >= energy * norm * (1 - 1e-12)


modules = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3), st.tuples(spectra, st.integers(1, 50)), min_size=1, max_size=5
)


@settings(deadline=None)
@given(modules, st.integers(1, 500))
def test_a_budget_takes_the_terms_of_most_energy_per_byte_until_one_does_not_fit(modules, budget):
    energies = {name: torch.tensor(values, dtype=torch.float64) for name, (values, _) in modules.items()}
    costs = {name: cost for name, (_, cost) in modules.items()}

    ranks = ranks_for_budget(energies, costs, budget)

    used = sum(ranks[name] * costs[name] for name in ranks)
    taken = [energies[name][i] / costs[name] for name in ranks for i in range(ranks[name])]
    left = [
        (energies[name][ranks[name]] / costs[name], costs[name]) for name in ranks if ranks[name] < len(energies[name])
    ]
    assert used <= budget
    assert all(gain > 0 for gain in taken)
    wanted = max((gain for gain, _ in left), default=0)
    assert all(gain >= wanted for gain in taken)
    assert wanted == 0 or used + max(cost for gain, cost in left if gain == wanted) > budget


def test_a_budget_by_hand():
    energies = {"wide": torch.tensor([100.0, 10.0]), "narrow": torch.tensor([30.0, 20.0, 1.0])}
    costs = {"wide": 20, "narrow": 5}  # per byte: wide 5, 0.5; narrow 6, 4, 0.2

    assert ranks_for_budget(energies, costs, 5) == {"wide": 0, "narrow": 1}
    assert ranks_for_budget(energies, costs, 30) == {"wide": 1, "narrow": 2}
    assert ranks_for_budget(energies, costs, 10**6) == {"wide": 2, "narrow": 3}
    assert ranks_for_budget({}, {}, 10) == {}


@pytest.mark.parametrize(
    "values",
    [
        {"max_rank": 0},
        {"max_rank": -1},
        {"energy": 0.0},
        {"energy": 1.1},
        {"energy": float("nan")},
        {"budget_bytes": 0},
    ],
    ids=str,
)
def test_a_rule_that_keeps_nothing_is_refused(values):
    with pytest.raises(UsageError):
        RankRule(**values)


def test_a_rule_without_any_part_is_empty():
    assert RankRule().is_empty
    assert not RankRule(energy=0.9).is_empty
