"""Rotary embedding's tables: cosine and sine of every position, computed once."""

import math

import torch
from torch import Tensor

from flora.serve.engine.model.config import RopeConfig


def rope_tables(rope: RopeConfig, head_dim: int, max_context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of position * inverse frequency, each float32 [max_context, head_dim / 2].

    A table and not a computation in the step: torch's vectorised cos and its scalar tail differ in the last bit, so a
    row's value would depend on its place in the batch.
    """
    positions = torch.arange(max_context, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(rope, head_dim))
    return angles.cos().to(device), angles.sin().to(device)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per token of each pair, float32 [head_dim / 2]. Source of the stretching: Llama 3.1's reference code."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inverse = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return inverse / rope.factor
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / inverse
        low, high = rope.low_freq_factor, rope.high_freq_factor
        share = ((rope.original_context / wavelength - low) / (high - low)).clamp(0, 1)  # 1: left alone, 0: stretched
        return share * inverse + (1 - share) * inverse / rope.factor
    return inverse
