"""Arithmetic on factors, against numpy in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flora.lowrank import (
    LowRank,
    component_energies,
    difference_norm_squared,
    is_svd_ordered,
    norm_squared,
    pad,
    split_svd,
    svd_order,
    trim,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_factors(seed: int, rank: int, out_features: int = 24, in_features: int = 20, dtype=torch.float32, scale=0.7):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, in_features, generator=generator).to(dtype)
    B = torch.randn(out_features, rank, generator=generator).to(dtype)
    return LowRank(A=A, B=B, scale=scale)


def product(factors: LowRank) -> np.ndarray:
    return factors.scale * factors.B.double().numpy() @ factors.A.double().numpy()


shapes = st.tuples(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 16), st.integers(1, 16))


@settings(deadline=None, max_examples=50)
@given(shapes, st.sampled_from(DTYPES))
def test_norms_and_energies_are_numpys(shape, dtype):
    seed, rank, out_features, in_features = shape
    factors = random_factors(seed, rank, out_features, in_features, dtype)
    other = random_factors(seed + 1, 3, out_features, in_features, dtype, scale=2.0)

    terms = [factors.scale * np.outer(factors.B[:, i].double(), factors.A[i].double()) for i in range(rank)]
    assert norm_squared(factors) == pytest.approx(np.square(product(factors)).sum(), rel=1e-9, abs=1e-12)
    assert component_energies(factors).numpy() == pytest.approx([np.square(term).sum() for term in terms], rel=1e-12)
    assert difference_norm_squared(factors, other) == pytest.approx(
        np.square(product(factors) - product(other)).sum(), rel=1e-9, abs=1e-12
    )
    np.testing.assert_allclose(factors.delta(), product(factors), rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=50)
@given(shapes)
def test_svd_order_is_numpys_svd_of_the_same_product(shape):
    seed, rank, out_features, in_features = shape
    factors = random_factors(seed, rank, out_features, in_features)

    ordered = svd_order(factors)

    expected = np.linalg.svd(product(factors), compute_uv=False)[: ordered.rank]
    assert ordered.scale == 1.0
    assert ordered.rank <= min(rank, out_features, in_features)
    np.testing.assert_allclose(product(ordered), product(factors), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(component_energies(ordered).sqrt(), expected, rtol=1e-4, atol=1e-5)
    assert is_svd_ordered(ordered)


@pytest.mark.parametrize("dtype", DTYPES)
def test_svd_order_survives_storage_in_half_precision(dtype):
    ordered = svd_order(random_factors(seed=3, rank=8, dtype=dtype))

    assert ordered.A.dtype == dtype
    assert is_svd_ordered(ordered)
    assert is_svd_ordered(trim(ordered, 5))


def test_a_rank_over_the_matrix_itself_falls_to_its_size():
    assert svd_order(random_factors(seed=1, rank=3, out_features=2, in_features=5)).rank == 2
    assert svd_order(random_factors(seed=1, rank=9, out_features=7, in_features=4)).rank == 4


def test_factors_in_no_order_are_seen_as_such():
    ordered = svd_order(random_factors(seed=3, rank=4))
    backwards = LowRank(A=ordered.A.flip(0), B=ordered.B.flip(1))

    assert not is_svd_ordered(random_factors(seed=3, rank=4))
    assert not is_svd_ordered(backwards)


def test_terms_lost_in_rounding_do_not_spoil_the_order():
    S = torch.tensor([1.0, 0.5, 1e-9, 1e-10], dtype=torch.float64)
    U, V = (
        torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0],
    ) * 2

    assert is_svd_ordered(split_svd(U[:, :4], S, V[:4], torch.float16))


def test_equal_deltas_give_equal_bytes_whatever_signs_the_svd_chose():
    U, S, Vh = torch.linalg.svd(torch.randn(9, 7, generator=torch.Generator().manual_seed(5)), full_matrices=False)
    signs = torch.tensor([1.0, -1, 1, -1, -1, 1, 1])

    one = split_svd(U, S, Vh, torch.bfloat16)
    other = split_svd(U * signs, S, signs[:, None] * Vh, torch.bfloat16)

    assert torch.equal(one.A, other.A)
    assert torch.equal(one.B, other.B)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 8), st.integers(0, 8))
def test_padding_keeps_the_product_and_trimming_gives_the_factors_back(seed, rank, extra):
    factors = random_factors(seed, rank)

    padded = pad(factors, rank + extra)

    assert padded.rank == rank + extra
    np.testing.assert_allclose(product(padded), product(factors), rtol=1e-12, atol=1e-12)
    assert torch.equal(trim(padded, rank).A, factors.A)
    assert torch.equal(trim(padded, rank).B, factors.B)


def test_factors_cannot_be_padded_down():
    with pytest.raises(ValueError, match="cannot pad rank 4 down to 3"):
        pad(random_factors(seed=0, rank=4), 3)


def test_sizes_count_stored_bytes():
    factors = random_factors(seed=0, rank=4, out_features=24, in_features=20, dtype=torch.bfloat16)

    assert factors.bytes_per_rank == 2 * (24 + 20)
    assert factors.num_bytes == 4 * 88
    assert (factors.out_features, factors.in_features) == (24, 20)
    assert trim(factors, 1).num_bytes == 88
