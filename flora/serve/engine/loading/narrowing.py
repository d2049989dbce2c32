"""Factors in fp8: each matrix times the power of two that brings its largest number to the end of fp8's range.

A number keeps four binary digits, and fewer if it is less than 2**-15 of the matrix's largest. What was fp8 before, as
`flora extract --dtype float8` stores it, keeps every one.
"""

import math

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max
_MOST = 120  # of an exponent: both of a module and its scale are one float32


def narrow(numbers: Tensor) -> tuple[Tensor, int] | None:
    """(fp8, exponent) with numbers ≈ fp8 * 2**-exponent, each to 2**-4 of itself; None if one is not finite.

    numbers  fp32, fp16, bf16 or fp8
    """
    if numbers.dtype not in (torch.float32, torch.bfloat16):  # these hold all numbers times a power of two
        numbers = numbers.float()
    if not numbers.numel():
        return numbers.to(FP8), 0
    least, most = torch.aminmax(numbers)
    largest = max(-float(least), float(most))
    if not math.isfinite(largest):
        return None
    exponent = math.frexp(_LARGEST / largest)[1] - 1 if largest else 0  # the largest does not pass the end of fp8
    exponent = max(-_MOST, min(_MOST, exponent))
    return (numbers * 2.0**exponent).to(FP8), exponent
