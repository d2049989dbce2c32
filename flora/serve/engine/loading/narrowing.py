"""Factors in fp8: each matrix times the power of two that brings its largest number to the end of fp8's range.

A number keeps four binary digits, and fewer if it is less than 2**-13 of the matrix's largest. What was fp8 before, as
`flora extract --dtype float8` stores it, keeps every one.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max
_NAN = 0x7F  # of either sign; there is no infinity
_MOST = 120  # of an exponent: two of them go into a module's scale, one float32
_BLOCK = 1 << 16  # numbers looked up at a time: their places, eight bytes each, stay in the second-level cache


def narrow(numbers: Tensor) -> tuple[Tensor, int] | None:
    """(fp8, exponent) with numbers ≈ fp8 * 2**-exponent, each to 2**-4 of itself; None if one is not finite.

    numbers  fp32, fp16, bf16 or fp8
    """
    if not numbers.numel():
        return numbers.to(FP8), 0
    if numbers.dtype == FP8:
        is_finite = int((numbers.view(torch.uint8) & _NAN).max()) < _NAN  # torch would widen them first
        return (numbers, 0) if is_finite else None
    least, most = torch.aminmax(numbers)
    largest = max(-float(least), float(most))
    if not math.isfinite(largest):
        return None
    exponent = math.frexp(_LARGEST / largest)[1] - 1 if largest else 0  # the largest does not pass the end of fp8
    exponent = max(-_MOST, min(_MOST, exponent))
    if numbers.dtype == torch.float32:
        return (numbers * 2.0**exponent).to(FP8), exponent
    return _looked_up(numbers, exponent), exponent


def _looked_up(numbers: Tensor, exponent: int) -> Tensor:
    """Of 16 bits each, by a table of them all: torch rounds some of these dtypes to fp8 ten times as slowly."""
    table = _table(numbers.dtype, exponent)
    bits = numbers.contiguous().view(torch.int16).numpy().view(np.uint16).reshape(-1)
    narrowed = np.empty(bits.size, np.uint8)
    places = np.empty(min(_BLOCK, bits.size), np.intp)
    for start in range(0, bits.size, _BLOCK):
        block = bits[start : start + _BLOCK]
        places[: block.size] = block
        np.take(table, places[: block.size], out=narrowed[start : start + block.size], mode="wrap")
    return torch.from_numpy(narrowed).view(FP8).view(numbers.shape)


@lru_cache(maxsize=64)
def _table(dtype: torch.dtype, exponent: int) -> NDArray[np.uint8]:
    """Every number of `dtype` times 2**exponent, in fp8, by its bits. What is not finite stands for nothing."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float() * 2.0**exponent
    table: NDArray[np.uint8] = every.clamp(-_LARGEST, _LARGEST).to(FP8).view(torch.uint8).numpy()
    return table
