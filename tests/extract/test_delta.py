import math

import numpy as np
import pytest
import torch

from flora.extract.delta import Workspace, compute_delta, is_finite, same_bits

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def weights(shape=(48, 32), dtype=torch.bfloat16, scale=0.02, seed=0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("tuned_dtype", DTYPES)
def test_a_delta_is_the_exact_difference_rounded_once_to_float32(base_dtype, tuned_dtype):
    base, tuned = weights(dtype=base_dtype, seed=1), weights(dtype=tuned_dtype, seed=2)

    delta = compute_delta(base, tuned, Workspace())

    exact = tuned.double().numpy() - base.double().numpy()
    np.testing.assert_array_equal(delta.values.numpy(), exact.astype(np.float32))
    assert delta.norm_squared == pytest.approx(np.square(exact).sum(), rel=1e-6)


def test_the_norm_of_many_chunks_is_the_norm_of_the_whole():
    base, tuned = weights((700, 1000), seed=1), weights((700, 1000), seed=2)  # three chunks of rows

    with_values, without = compute_delta(base, tuned, Workspace()), compute_delta(base, tuned)

    exact = np.square((tuned.float() - base.float()).double().numpy()).sum()
    assert with_values.norm_squared == pytest.approx(exact, rel=1e-12)
    assert without.norm_squared == with_values.norm_squared
    assert without.values is None


def test_equal_bits_are_skipped_and_equal_values_of_other_dtypes_have_no_change():
    base = weights()

    assert same_bits(base, base.clone())
    assert compute_delta(base, base.clone(), Workspace()).values is None
    assert compute_delta(base, base.float(), Workspace()).norm_squared == 0


def test_one_changed_bit_is_a_change():
    base = weights((700, 1000))
    tuned = base.clone()
    tuned[-1, -1] += 0.5

    assert not same_bits(base, tuned)
    assert compute_delta(base, tuned).norm_squared == pytest.approx(0.25, rel=0.02)


def test_neither_tensor_is_written_to():
    base, tuned = weights(dtype=torch.float32, seed=1), weights(dtype=torch.float32, seed=2)
    before = base.clone(), tuned.clone()

    compute_delta(base, tuned)
    compute_delta(base, tuned, Workspace())

    assert torch.equal(base, before[0])
    assert torch.equal(tuned, before[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_norm_shows_bad_numbers_on_either_side_and_on_both(bad):
    good, broken = weights(), weights()
    broken[3, 4] = bad

    assert is_finite(good)
    assert not is_finite(broken)
    for base, tuned in ((good, broken), (broken, good), (broken, broken.clone())):
        assert not math.isfinite(compute_delta(base, tuned).norm_squared)


def rounded(base: torch.Tensor, step: float) -> tuple[torch.Tensor, float]:
    """base + a change of RMS `step`, stored in base's dtype, and the squared norm of what storing it lost."""
    true = base.double() + weights(tuple(base.shape), torch.float64, scale=step, seed=5)
    tuned = true.to(base.dtype)
    return tuned, float((tuned.double() - true).square().sum())


@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 3e-4), (torch.float16, 3e-5), (torch.float32, 3e-6)])
def test_storage_noise_is_what_rounding_the_tuned_weights_put_into_the_delta(dtype, step):
    base = weights((512, 512), dtype)
    tuned, actual = rounded(base, step)

    assert compute_delta(base, tuned).noise == pytest.approx(actual, rel=0.05)


def test_storage_noise_of_changes_below_an_ulp_is_bounded_by_the_norm():
    base = weights((512, 512))
    tuned, _ = rounded(base, 1e-6)

    delta = compute_delta(base, tuned)

    assert 0 < delta.noise <= delta.norm_squared


def test_rows_that_nobody_tuned_have_no_storage_noise():
    base = weights((512, 512))
    tuned, _ = rounded(base, 3e-4)
    whole = compute_delta(base, tuned).noise
    tuned[:384] = base[:384]

    assert compute_delta(base, tuned).noise == pytest.approx(whole / 4, rel=0.05)


def test_a_workspace_is_used_again_and_grows():
    workspace = Workspace()

    small = workspace.matrix(torch.Size([4, 4]))
    again = workspace.matrix(torch.Size([2, 8]))
    large = workspace.matrix(torch.Size([8, 8]))

    assert again.data_ptr() == small.data_ptr()
    assert large.shape == (8, 8)
