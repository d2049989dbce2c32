"""Normalisation, rotary embedding and gated activation in plain torch, for CPU and GPU.

Each is built from operations that round every element by itself (multiply, add, divide, exp) and sums over whole rows,
so a row's bits do not depend on the batch. torch's fused `silu` is avoided on a CPU for that reason: it treats the last
few elements of a tensor with another formula than the rest.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x**2) + eps) over the last dimension.

    x  [..., size];  weight  [size]. Float32 inside, rounded to x's dtype before the weight, as Llama does.
    """
    x32 = x.float()
    inverse_rms = torch.rsqrt((x32 * x32).mean(-1, keepdim=True) + eps)
    return weight * (x32 * inverse_rms).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x rotated by each row's position in Llama's half-split convention: element d pairs with d + head_dim / 2.

    x         [n, num_heads, head_dim]
    cos, sin  float32 [n, head_dim / 2], of position * inverse frequency
    returns   x's shape and dtype; float32 inside, one rounding.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for gate_up [..., 2 * size], gate first; float32 inside, one rounding to its dtype."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    if gate_up.device.type != "cpu":
        return (F.silu(gate) * up).to(gate_up.dtype)
    return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)
