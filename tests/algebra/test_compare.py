"""Two adapters told apart; the judge forms the whole matrices, in numpy and float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flora.adapter import Adapter, make_adapter
from flora.algebra.compare import compare, principal_angles
from flora.errors import BaseMismatch
from flora.lowrank import LowRank, pad
from tests.registry.adapters import BASE, Q_PROJ, UP_PROJ, random_adapter


def product(factors: LowRank) -> np.ndarray:
    return factors.scale * factors.B.double().numpy() @ factors.A.double().numpy()


def angles(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Between column spaces, from whole matrices: the dense definition."""
    bases = []
    for matrix in (left, right):
        U, S, _ = np.linalg.svd(matrix, full_matrices=False)
        bases.append(U[:, 1e-6 * S[0] < S])
    cosines = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    return np.degrees(np.arccos(np.clip(cosines, 0, 1)))


def with_factors(adapter: Adapter, factors: dict[str, LowRank]) -> Adapter:
    return make_adapter(factors, BASE, adapter.header.recipe)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), ranks=st.tuples(st.integers(1, 12), st.integers(1, 12)), scale=st.floats(0.1, 10))
def test_distances_cosines_and_angles_are_those_of_the_whole_matrices(seed, ranks, scale):
    left = random_adapter(seed, {Q_PROJ: ranks[0]}, torch.float32)
    right = random_adapter(seed + 1, {Q_PROJ: ranks[1]}, torch.float32, scale)

    (found,) = compare(left, right).modules

    one, other = product(left.factors[Q_PROJ]), product(right.factors[Q_PROJ])
    norms = np.linalg.norm(one), np.linalg.norm(other)
    assert found.distance == pytest.approx(np.linalg.norm(one - other) / max(norms), rel=1e-9)
    assert found.cosine == pytest.approx((one * other).sum() / np.prod(norms), abs=1e-9)
    assert len(found.output_angles) == min(ranks)
    np.testing.assert_allclose(found.output_angles, angles(one, other), atol=1e-4)
    np.testing.assert_allclose(found.input_angles, angles(one.T, other.T), atol=1e-4)


def test_an_adapter_is_at_no_distance_and_no_angle_from_itself():
    adapter = random_adapter()

    found = compare(adapter, adapter)

    assert found.distance < 1e-12
    assert found.cosine == pytest.approx(1)
    assert all(angle < 1e-5 for module in found.modules for angle in module.output_angles + module.input_angles)


def test_a_negated_adapter_is_at_distance_two():
    adapter = random_adapter()
    negated = {name: LowRank(A=one.A, B=-one.B, scale=one.scale) for name, one in adapter.factors.items()}

    found = compare(adapter, with_factors(adapter, negated))

    assert found.distance == pytest.approx(2)
    assert found.cosine == pytest.approx(-1)


def test_a_tiny_angle_keeps_its_digits():
    """A ten-millionth of a radian, whose cosine differs from 1 by less than float64 can tell."""
    eye = torch.eye(5, dtype=torch.float64)
    tilt = 1e-7
    left = eye[:, :1]
    right = (eye[:, :1] + tilt * eye[:, 1:2]) / (1 + tilt**2) ** 0.5

    assert principal_angles(left, right) == [pytest.approx(np.degrees(tilt), rel=1e-6)]


def test_angles_of_spaces_that_share_one_direction():
    eye = torch.eye(6, dtype=torch.float64)
    slanted = (eye[:, 1] + eye[:, 4]) / 2**0.5

    found = principal_angles(eye[:, :2], torch.stack([eye[:, 0], slanted, eye[:, 5]], dim=1))

    assert found == [pytest.approx(0, abs=1e-9), pytest.approx(45)]


def test_padding_and_the_split_of_a_product_do_not_count():
    adapter = random_adapter(dtype=torch.float32)
    mix = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))[0]
    one = adapter.factors[Q_PROJ]
    same = adapter.factors | {Q_PROJ: pad(LowRank(A=mix @ one.A, B=one.B @ mix.T), 9)}

    found = compare(adapter, with_factors(adapter, same))

    assert found.distance < 1e-6
    assert len(found.modules[0].output_angles) == 4


def test_a_module_that_only_one_has_is_as_far_as_from_nothing():
    left, right = random_adapter(), random_adapter(ranks={Q_PROJ: 4})

    found = {module.name: module for module in compare(left, right).modules}

    assert found[Q_PROJ].distance < 1e-12
    assert (found[UP_PROJ].distance, found[UP_PROJ].cosine, found[UP_PROJ].right_rank) == (1.0, None, 0)
    assert found[UP_PROJ].output_angles == ()


def test_adapters_of_other_shapes_are_refused():
    odd = with_factors(random_adapter(), {Q_PROJ: LowRank(A=torch.randn(2, 5), B=torch.randn(3, 2))})

    with pytest.raises(BaseMismatch, match=rf"{Q_PROJ} is \[32, 32\] in the one adapter and \[3, 5\] in the other"):
        compare(random_adapter(), odd)
