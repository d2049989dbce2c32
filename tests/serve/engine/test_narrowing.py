"""Rounding to fp8 against float64, number by number."""

import re

import numpy as np
import pytest
import torch

from flora.serve.engine.loading import narrowing
from flora.serve.engine.loading.narrowing import FP8, narrow

FINITE = torch.arange(256, dtype=torch.uint8).view(FP8)
FINITE = FINITE[FINITE.float().isfinite()]


def as_float64(numbers: torch.Tensor) -> np.ndarray:
    return numbers.double().numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
def test_each_number_is_kept_to_four_binary_digits(dtype, size):
    numbers = (torch.randn(40, 77, generator=torch.Generator().manual_seed(3)) * size).to(dtype)

    kept, exponent = narrow(numbers)

    wanted, found = as_float64(numbers), as_float64(kept) * 2.0**-exponent
    assert kept.dtype == FP8
    assert 224 <= np.abs(as_float64(kept)).max() <= 448, "no binade of fp8 is left over"
    normal = np.abs(wanted) >= np.abs(wanted).max() * 2.0**-13
    assert normal.mean() > 0.99
    assert (np.abs(found - wanted)[normal] <= 2.0**-4 * np.abs(wanted)[normal]).all()
    assert (np.abs(found - wanted) <= 2.0**-4 * np.maximum(np.abs(wanted), 2.0 ** (-6 - exponent))).all()
    assert np.linalg.norm(found - wanted) < 0.03 * np.linalg.norm(wanted)


@pytest.mark.parametrize("largest", [225.0, 256.0, 300.0, 448.0])
def test_a_number_keeps_its_digits_down_to_the_share_of_the_largest_that_is_documented(largest):
    """Most is lost next to 224, the least that the largest number becomes: fp8 has four digits from 2**-6 on."""
    share = float(re.search(r"less than 2\*\*(-\d+) of the matrix", narrowing.__doc__)[1])
    smallest = torch.linspace(1, 2, 4097) * largest * 2.0**share

    kept, exponent = narrow(torch.cat([torch.tensor([largest]), smallest]))

    found, wanted = as_float64(kept)[1:] * 2.0**-exponent, as_float64(smallest)
    assert (np.abs(found - wanted) <= 2.0**-4 * wanted).all()


@pytest.mark.parametrize("largest", [448.0, 240.0, 1.0, 2.0**-9])
def test_what_was_fp8_before_keeps_every_bit_of_its_numbers(largest):
    numbers = FINITE[FINITE.float().abs() <= largest]

    for given in (numbers, numbers.float(), numbers.bfloat16()):
        kept, exponent = narrow(given)

        assert np.array_equal(as_float64(kept) * 2.0**-exponent, as_float64(numbers))


@pytest.mark.parametrize("numbers", [torch.zeros(3, 4), torch.zeros(0, 4), torch.full((2, 2), -0.0)])
def test_nothing_stays_nothing(numbers):
    kept, exponent = narrow(numbers)

    assert exponent == 0
    assert torch.equal(kept.float(), numbers)


@pytest.mark.parametrize("number", [1e-44, 1e-38, 3e38, -3e38])
def test_the_smallest_and_the_largest_float32_do_not_overflow(number):
    kept, exponent = narrow(torch.tensor([[number, number / 4]]))

    assert bool(kept.float().isfinite().all())
    assert -120 <= exponent <= 120
    if abs(number) > 1e-36:
        assert float(kept.double()[0, 0]) * 2.0**-exponent == pytest.approx(number, rel=2.0**-4)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(number):
    assert narrow(torch.tensor([1.0, number, 2.0])) is None
    assert narrow(torch.tensor([1.0, number, 2.0]).bfloat16()) is None


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_what_was_fp8_before_and_is_no_number_is_refused(byte):
    numbers = FINITE.view(torch.uint8).clone()
    assert narrow(numbers.view(FP8)) is not None
    numbers[100] = byte

    assert narrow(numbers.view(FP8)) is None
