import torch

from flora.extract.rank import shortfall, smallest_rank, terms_to_fit
from flora.rank import RankRule

KEPT = torch.tensor([64.0, 90.0, 97.0, 99.0], dtype=torch.float64)  # of 100


def test_the_rank_is_the_smallest_whose_stored_terms_keep_the_energy():
    assert smallest_rank(KEPT, norm_squared=100.0, energy=0.64) == 1
    assert smallest_rank(KEPT, norm_squared=100.0, energy=0.65) == 2
    assert smallest_rank(KEPT, norm_squared=100.0, energy=0.99) == 4


def test_energy_out_of_reach_keeps_every_term_that_adds_something():
    rounding = torch.tensor([64.0, 90.0, 90.0 + 1e-7, 90.0 - 1e-7], dtype=torch.float64)

    assert smallest_rank(KEPT, norm_squared=100.0, energy=0.999) == 4
    assert smallest_rank(rounding, norm_squared=100.0, energy=0.999) == 2


def test_without_an_energy_the_rank_is_all_terms_that_add_something():
    assert smallest_rank(KEPT, norm_squared=100.0, energy=None) == 4


def test_a_few_spare_terms_are_fitted_if_there_are_any():
    assert terms_to_fit(needed=10, available=100) == 12
    assert terms_to_fit(needed=99, available=100) == 100


def test_a_missed_energy_is_explained():
    def why(rule: RankRule, *, rank: int, cap: int, cut: bool = False) -> str | None:
        return shortfall(0.9, rule, rank=rank, cap=cap, side=64, cut=cut, dtype="bfloat16")

    assert why(RankRule(energy=0.9), rank=64, cap=64) is None
    assert why(RankRule(max_rank=8), rank=8, cap=8) is None
    assert why(RankRule(max_rank=8, energy=0.95), rank=8, cap=8).endswith("capped at rank 8")
    assert why(RankRule(energy=0.95, budget_bytes=9), rank=3, cap=16, cut=True).endswith("the budget ends here")
    assert why(RankRule(energy=0.95, budget_bytes=9), rank=16, cap=16).endswith("the budget ends here")
    assert why(RankRule(energy=1.0), rank=64, cap=64).endswith("rounding to bfloat16 takes the rest")
