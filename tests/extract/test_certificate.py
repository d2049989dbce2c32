"""The certificate against residuals formed whole in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flora.extract.certificate import kept_by_rank
from flora.extract.factorize import factorize, wide
from flora.extract.fit import fit
from flora.lowrank import LowRank, is_svd_ordered, trim
from tests.extract.models import best_share, residual_share
from tests.extract.test_factorize import matrix


def kept_energy(delta: torch.Tensor, factors: LowRank) -> float:
    """What the certificate says that all terms keep."""
    small, large = (factors.B.T, factors.A) if delta.shape[0] <= delta.shape[1] else (factors.A, factors.B.T)
    small = factors.scale * small.float()
    return float(kept_by_rank(small @ wide(delta), small, large)[-1])


def fitted(delta: torch.Tensor, rank: int, dtype: torch.dtype = torch.bfloat16):
    norm_squared = float(delta.double().square().sum())
    basis = factorize(wide(delta), norm_squared, max_rank=rank, energy=None, exact=False, seed="0")
    return fit(delta, basis, rank, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(63, 100), (100, 63), (500, 400)])
def test_the_certificate_is_the_residual_of_the_factors_as_stored(shape, dtype):
    delta = 1e-2 * matrix(shape, decay=0.7)

    result = fitted(delta, 16, dtype)

    exact = delta.double().numpy()
    norm_squared = np.square(exact).sum()
    direct = 1 - residual_share(exact, result.factors)
    assert result.factors.A.dtype == result.factors.B.dtype == dtype
    assert float(result.kept[-1]) / norm_squared == pytest.approx(direct, rel=1e-6)
    assert kept_energy(delta, result.factors) / norm_squared == pytest.approx(direct, rel=1e-6)


def test_every_leading_part_of_the_factors_has_its_own_certificate():
    delta = matrix((63, 100), decay=0.7)
    norm_squared = float(delta.double().square().sum())

    result = fitted(delta, 12)

    for rank in range(1, 13):
        direct = 1 - residual_share(delta.double().numpy(), trim(result.factors, rank))
        assert float(result.kept[rank - 1]) / norm_squared == pytest.approx(direct, rel=1e-6)


@given(
    out=st.integers(1, 40),
    width=st.integers(1, 40),
    rank=st.integers(1, 12),
    scale=st.sampled_from([0.25, 1.0, 2.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_any_factors_can_be_certified(out, width, rank, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(out, width, generator=generator)
    A, B = torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator)
    factors = LowRank(A=A.bfloat16(), B=B.bfloat16(), scale=scale)

    kept = kept_energy(delta, factors)

    norm_squared = float(delta.double().square().sum())
    product = scale * factors.B.double() @ factors.A.double()
    residual = float((delta.double() - product).square().sum())
    assert kept == pytest.approx(norm_squared - residual, rel=1e-5, abs=1e-5 * (norm_squared + residual))


@pytest.mark.parametrize(("dtype", "loss"), [(torch.bfloat16, 2e-5), (torch.float16, 1e-6), (torch.float32, 1e-6)])
def test_rounding_the_factors_costs_little(dtype, loss):
    delta = matrix((63, 100), decay=0.7)

    kept = float(fitted(delta, 16, dtype).kept[-1]) / float(delta.double().square().sum())

    assert 0 <= best_share(delta.double().numpy(), 16) - kept + 1e-7 < loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(63, 100), (400, 500), (500, 400)])
def test_fitted_factors_are_in_svd_order(shape, dtype):
    """So that pruning may cut them without another SVD."""
    assert is_svd_ordered(fitted(matrix(shape, decay=0.7, noise=1e-4), 16, dtype).factors)


def test_terms_that_the_dtype_cannot_hold_are_left_out():
    """float16 has nothing below 6e-8: the weak terms' rows would be zero."""
    delta = 1e-11 * matrix((63, 100), decay=3.0)

    result = fitted(delta, 16, torch.float16)

    norm_squared = float(delta.double().square().sum())
    direct = 1 - residual_share(delta.double().numpy(), result.factors)
    assert 0 < result.factors.rank < 16
    assert float(result.kept[-1]) / norm_squared == pytest.approx(direct, rel=1e-6)
