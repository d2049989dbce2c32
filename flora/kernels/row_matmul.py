"""Triton: x @ W.T whose every row is the same bits however many rows there are.

A library picks its tiles, and with them the order of a row's sum, by the number of rows. Here the tile is one for all,
and a program walks the whole inner dimension in one order, so a row's bits depend on the row and the weight alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flora.kernels.tuning import MatmulTuning


def row_matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None, tuning: MatmulTuning | None = None
) -> Tensor:
    """x @ weight.T + bias, [n, out_features] in x's dtype, summed in float32 and rounded once.

    x       [n, in_features], last dimension contiguous;  weight  [out_features, in_features], contiguous, of x's dtype
    bias    [out_features] or None;  out  where to leave it (None: new memory)
    Ground truth: torch.nn.functional.linear.
    """
    tuning = tuning or MatmulTuning()
    n, in_features = x.shape
    out_features = weight.shape[0]
    if out is None:
        out = torch.empty(n, out_features, dtype=x.dtype, device=x.device)
    tiles_m = triton.cdiv(n, tuning.block_rows)
    tiles_n = triton.cdiv(out_features, tuning.block_outputs)
    if tiles_m * tiles_n:
        _row_matmul_kernel[(tiles_m * tiles_n,)](
            x,
            weight,
            weight if bias is None else bias,
            out,
            n,
            out_features,
            in_features,
            x.stride(0),
            weight.stride(0),
            out.stride(0),
            HAS_BIAS=bias is not None,
            BLOCK_ROWS=tuning.block_rows,
            BLOCK_OUTPUTS=tuning.block_outputs,
            BLOCK_K=tuning.block_k,
            BAND=tuning.band,
            num_warps=tuning.num_warps,
            num_stages=tuning.num_stages,
        )
    return out


@triton.jit
def _row_matmul_kernel(  # type: ignore[no-untyped-def]
    p_x,
    p_weight,
    p_bias,
    p_out,
    n,
    out_features,
    in_features,
    x_row_stride,
    weight_row_stride,
    out_row_stride,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,  # tiles of outputs that are walked together, so that their weights are read from memory once
):
    tiles_m = tl.cdiv(n, BLOCK_ROWS)
    tiles_n = tl.cdiv(out_features, BLOCK_OUTPUTS)
    i_band = tl.program_id(0) // (BAND * tiles_m)
    band = tl.minimum(BAND, tiles_n - i_band * BAND)
    within = tl.program_id(0) - i_band * BAND * tiles_m
    i_n = i_band * BAND + within % band
    i_m = within // band

    o_rows = (i_m * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    o_outputs = (i_n * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)).to(tl.int64)
    m_rows, m_outputs = o_rows < n, o_outputs < out_features
    o_k = tl.arange(0, BLOCK_K)
    p_rows = p_x + o_rows[:, None] * x_row_stride + o_k[None, :]
    p_columns = p_weight + o_outputs[None, :] * weight_row_stride + o_k[:, None]
    b_sum = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), tl.float32)
    for k in range(0, in_features, BLOCK_K):
        m_k = k + o_k < in_features
        b_x = tl.load(p_rows + k, mask=m_rows[:, None] & m_k[None, :], other=0.0)
        b_weight = tl.load(p_columns + k, mask=m_outputs[None, :] & m_k[:, None], other=0.0)
        b_sum = tl.dot(b_x, b_weight, b_sum, input_precision="ieee")
    if HAS_BIAS:
        b_sum += tl.load(p_bias + o_outputs, mask=m_outputs, other=0.0).to(tl.float32)[None, :]
    p_tile = p_out + o_rows[:, None] * out_row_stride + o_outputs[None, :]
    tl.store(p_tile, b_sum.to(p_out.dtype.element_ty), mask=m_rows[:, None] & m_outputs[None, :])
