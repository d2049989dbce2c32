"""How long an extraction may take: what the estimate depends on, and never the weights."""

from dataclasses import replace

import pytest

from flora.extract import ExtractConfig, estimate_seconds, plan_extraction
from flora.extract.estimate import count_operations
from flora.rank import RankRule

RANK_64 = ExtractConfig(rule=RankRule(max_rank=64))


def test_an_estimate_reads_no_weight(pair, monkeypatch):
    monkeypatch.setattr("flora.checkpoint.Checkpoint.load", lambda *_: pytest.fail("a weight was read"))

    assert 0 < estimate_seconds(plan_extraction(*pair, RANK_64), RANK_64) < 60


def test_another_device_is_not_predicted(pair):
    plan = plan_extraction(*pair, RANK_64)

    assert estimate_seconds(plan, replace(RANK_64, device="cuda")) is None


def test_an_exact_svd_of_a_large_matrix_is_many_times_the_work():
    """14336 x 4096 at rank 64: 21.9 s by LAPACK against 0.7 s by Krylov was measured, 31 times."""
    shape = (14336, 4096)

    ratio = count_operations(shape, 64, replace(RANK_64, exact=True)) / count_operations(shape, 64, RANK_64)

    assert 20 < ratio < 150


@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (1536, 576), (192, 576)])
def test_more_terms_are_more_work(shape):
    counts = [count_operations(shape, rank, RANK_64) for rank in (8, 16, 32)]

    assert counts == sorted(counts)
    assert count_operations(shape, 16, RANK_64) == count_operations(shape[::-1], 16, RANK_64)
