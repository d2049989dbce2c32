"""Triton: W @ x for one row, the product that a single stream's step is made of.

It moves the weight once and computes next to nothing. Two things keep it below the memory's speed in a library: a
launch that waits for the one before it to end before it asks for its first byte, and programs that take a whole
multiprocessor, so that nothing runs beside them. Here a program asks for its first weights, which no launch of a step
writes, before it waits; and programs are many and small.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flora.kernels.tuning import OneRowTuning, overlapped


def one_row_matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    tuning: OneRowTuning | None = None,
    *,
    overlap: bool = False,
) -> Tensor:
    """x @ weight.T + bias, [1, out_features] in x's dtype, summed in float32 and rounded once.

    x       [1, in_features], last dimension contiguous;  weight  [out_features, in_features], contiguous, of x's dtype
    bias    [out_features] or None;  out  where to leave it (None: new memory)
    overlap  see fused.py: weight and bias are then read before the launch before this one has ended
    Ground truth: torch.nn.functional.linear.
    """
    tuning = tuning or OneRowTuning()
    out_features, in_features = weight.shape
    if out is None:
        out = torch.empty(1, out_features, dtype=x.dtype, device=x.device)
    block_k = min(tuning.block_elements, max(16, triton.next_power_of_2(in_features)))
    block_outputs = max(1, tuning.block_elements // block_k)
    if out_features:
        _one_row_kernel[(triton.cdiv(out_features, block_outputs),)](
            x,
            weight,
            weight if bias is None else bias,
            out,
            out_features,
            in_features,
            weight.stride(0),
            HAS_BIAS=bias is not None,
            BLOCK_OUTPUTS=block_outputs,
            BLOCK_K=block_k,
            num_warps=tuning.num_warps,
            **overlapped(overlap),
        )
    return out


@triton.jit
def _one_row_kernel(  # type: ignore[no-untyped-def]
    p_x,
    p_weight,
    p_bias,
    p_out,
    out_features,
    in_features,
    weight_row_stride,
    HAS_BIAS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    o_outputs = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    o_k = tl.arange(0, BLOCK_K)
    m_outputs = o_outputs < out_features
    p_rows = p_weight + o_outputs.to(tl.int64)[:, None] * weight_row_stride + o_k[None, :]
    b_weight = tl.load(p_rows, mask=m_outputs[:, None] & (o_k < in_features)[None, :], other=0.0)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    b_sum = tl.zeros((BLOCK_OUTPUTS, BLOCK_K), tl.float32)
    for k in range(0, in_features, BLOCK_K):
        m_next = k + BLOCK_K + o_k < in_features
        b_next = tl.load(p_rows + k + BLOCK_K, mask=m_outputs[:, None] & m_next[None, :], other=0.0)
        b_x = tl.load(p_x + k + o_k, mask=k + o_k < in_features, other=0.0)
        b_sum += b_weight.to(tl.float32) * b_x.to(tl.float32)[None, :]
        b_weight = b_next
    b_out = tl.sum(b_sum, 1)
    if HAS_BIAS:
        b_out += tl.load(p_bias + o_outputs, mask=m_outputs, other=0.0).to(tl.float32)
    tl.store(p_out + o_outputs, b_out.to(p_out.dtype.element_ty), mask=m_outputs)
