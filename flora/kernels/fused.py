"""Triton: what lies between the products of a layer, one launch each: norm, rotation with KV store, activation.

A decode step of 32 layers would launch some thirty small kernels a layer for these in plain torch, and each costs as
much as its launch. Rounding follows `pointwise.py`: float32 inside, and a rounding wherever that file has one.

overlap, everywhere: start while the launch before ends (programmatic dependent launch). What that launch may write is
read after `gdc_wait`, which waits for all of it; the model's weights and the step's inputs, which no launch of the step
writes, are read before. What reads low-rank terms waits for two streams and starts after both.

terms, everywhere: what the product read here still lacks; see `terms.py`. A row without an adapter has the same bits
where terms are read as where none are: products and sums are rounded apart, since the compiler fuses other ones in each
(`second * cos + first * sin` the other way round: two of the trials in `tests/serve/engine/test_cuda.py` saw it).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flora.kernels.terms import LowRankTerms
from flora.kernels.tuning import overlapped


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, overlap: bool) -> Tensor:
    """See Ops.rms_norm.  Ground truth: pointwise.rms_norm."""
    x = x.contiguous()  # heads of a fused product are not
    out = torch.empty_like(x)
    _launch_norm(x, x, weight, out, eps, None, add=False, overlap=overlap)
    return out


def add_rms_norm(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, terms: LowRankTerms | None = None, *, overlap: bool
) -> Tensor:
    """See Ops.add_rms_norm: x += delta in place, and the norm of the sum."""
    out = torch.empty_like(x)
    _launch_norm(x, delta, weight, out, eps, terms, add=True, overlap=overlap)
    return out


def rope_store(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv: Tensor,
    slots: Tensor,
    terms: LowRankTerms | None = None,
    *,
    overlap: bool,
) -> Tensor:
    """See Ops.rope_store: q is rotated where it lies; k, rotated, and v go straight to their pages."""
    n = qkv.shape[0]
    num_kv_heads, head_dim = kv.shape[3:]
    num_q_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    heads = num_q_heads + 2 * num_kv_heads
    block_heads = 8
    if n:
        _rope_store_kernel[(n, triton.cdiv(heads, block_heads))](
            qkv,
            positions,
            cos,
            sin,
            kv,
            slots,
            *_pointers(terms, qkv),
            qkv.stride(0),
            cos.stride(0),
            *kv.stride()[:4],
            PAGE_TOKENS=kv.shape[2],
            NUM_Q_HEADS=num_q_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            HALF=triton.next_power_of_2(head_dim // 2),
            BLOCK_HEADS=block_heads,
            TERMS=terms is not None,
            num_warps=2,
            enable_fp_fusion=False,
            **overlapped(overlap and terms is None),
        )
    return qkv[:, : num_q_heads * head_dim].view(n, num_q_heads, head_dim)


def silu_mul(gate_up: Tensor, terms: LowRankTerms | None = None, *, overlap: bool) -> Tensor:
    """See Ops.silu_mul.  Ground truth: pointwise.silu_mul."""
    n, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(n, size, dtype=gate_up.dtype, device=gate_up.device)
    block = 1024
    if n:
        _silu_mul_kernel[(n, triton.cdiv(size, block))](
            gate_up,
            out,
            *_pointers(terms, gate_up),
            size,
            gate_up.stride(0),
            BLOCK=block,
            TERMS=terms is not None,
            num_warps=4,
            enable_fp_fusion=False,
            **overlapped(overlap and terms is None),
        )
    return out


def _pointers(terms: LowRankTerms | None, unread: Tensor) -> tuple[Tensor, Tensor]:
    """The values and the rows; where there are none, something that a kernel may have and does not read."""
    return (terms.values, terms.adapter_rows) if terms else (unread, unread)


def _launch_norm(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    out: Tensor,
    eps: float,
    terms: LowRankTerms | None,
    *,
    add: bool,
    overlap: bool,
) -> None:
    size = x.shape[-1]
    rows = x.numel() // size
    if rows:
        block = triton.next_power_of_2(size)
        num_warps = max(1, min(8, block // 512))
        _norm_kernel[(rows,)](
            x,
            delta,
            *_pointers(terms, delta),
            weight,
            out,
            eps,
            size,
            ADD=add,
            TERMS=terms is not None,
            BLOCK=block,
            num_warps=num_warps,
            enable_fp_fusion=False,
            **overlapped(overlap and terms is None),
        )


@triton.jit
def _with_terms(b_y, p_terms, p_adapter_row, mask):  # type: ignore[no-untyped-def]
    """A row's product with its low-rank terms; its very bits, whatever lies in p_terms, if the row has no adapter."""
    has_adapter = tl.load(p_adapter_row) != 0
    b_terms = tl.load(p_terms, mask=mask, other=0.0)  # of every row, so that neither load waits for the other
    b_sum = (b_y.to(tl.float32) + b_terms.to(tl.float32)).to(b_y.dtype)
    return tl.where(has_adapter, b_sum, b_y)


@triton.jit
def _norm_kernel(  # type: ignore[no-untyped-def]
    p_x,
    p_delta,
    p_terms,
    p_adapter_rows,
    p_weight,
    p_out,
    eps,
    size,
    ADD: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * size
    o = tl.arange(0, BLOCK)
    mask = o < size
    b_weight = tl.load(p_weight + o, mask=mask, other=0.0)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    b_x = tl.load(p_x + o_row + o, mask=mask, other=0.0)
    if ADD:
        # the sum is rounded to x's dtype first, as the reference's two torch calls do
        b_delta = tl.load(p_delta + o_row + o, mask=mask, other=0.0)
        if TERMS:
            b_delta = _with_terms(b_delta, p_terms + o_row + o, p_adapter_rows + tl.program_id(0), mask)
        b_x = (b_x.to(tl.float32) + b_delta.to(tl.float32)).to(p_x.dtype.element_ty)
        tl.store(p_x + o_row + o, b_x, mask=mask)
    b_x32 = b_x.to(tl.float32)
    inverse_rms = 1.0 / tl.sqrt(tl.sum(b_x32 * b_x32, axis=0) / size + eps)
    b_normed = (b_x32 * inverse_rms).to(p_x.dtype.element_ty).to(tl.float32)
    tl.store(p_out + o_row + o, (b_weight.to(tl.float32) * b_normed).to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def _rope_store_kernel(  # type: ignore[no-untyped-def]
    p_qkv,
    p_positions,
    p_cos,
    p_sin,
    p_kv,
    p_slots,
    p_terms,
    p_adapter_rows,
    row_stride,
    table_stride,
    page_stride,
    value_stride,
    token_stride,
    head_stride,
    PAGE_TOKENS: tl.constexpr,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # head_dim / 2, rounded up to a power of two
    BLOCK_HEADS: tl.constexpr,
    TERMS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    o_dim = tl.arange(0, HALF)
    half = HEAD_DIM // 2
    position, slot = tl.load(p_positions + row), tl.load(p_slots + row)
    b_cos = tl.load(p_cos + position * table_stride + o_dim, mask=o_dim < half, other=0.0)[None, :]
    b_sin = tl.load(p_sin + position * table_stride + o_dim, mask=o_dim < half, other=0.0)[None, :]
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    m = (o_head[:, None] < NUM_Q_HEADS + 2 * NUM_KV_HEADS) & (o_dim[None, :] < half)
    o_first = row * row_stride + o_head[:, None] * HEAD_DIM + o_dim[None, :]
    p_first = p_qkv + o_first
    b_first = tl.load(p_first, mask=m, other=0.0)
    b_second = tl.load(p_first + half, mask=m, other=0.0)
    if TERMS:
        b_first = _with_terms(b_first, p_terms + o_first, p_adapter_rows + row, m)
        b_second = _with_terms(b_second, p_terms + o_first + half, p_adapter_rows + row, m)

    first32, second32 = b_first.to(tl.float32), b_second.to(tl.float32)
    dtype = p_qkv.dtype.element_ty
    rotated_first = (first32 * b_cos - second32 * b_sin).to(dtype)
    rotated_second = (second32 * b_cos + first32 * b_sin).to(dtype)

    is_q = o_head[:, None] < NUM_Q_HEADS
    tl.store(p_first, rotated_first, mask=m & is_q)
    tl.store(p_first + half, rotated_second, mask=m & is_q)

    if slot >= 0:
        # slot is int64, and with it every offset: a plane may pass 2**31 elements
        p_token = p_kv + slot // PAGE_TOKENS * page_stride + slot % PAGE_TOKENS * token_stride
        i_kv = o_head - NUM_Q_HEADS
        is_v = i_kv >= NUM_KV_HEADS
        i_head = tl.where(is_v, i_kv - NUM_KV_HEADS, i_kv)
        p_store = p_token + (tl.where(is_v, value_stride, 0) + i_head * head_stride)[:, None] + o_dim[None, :]
        tl.store(p_store, tl.where(is_v[:, None], b_first, rotated_first), mask=m & ~is_q)
        tl.store(p_store + half, tl.where(is_v[:, None], b_second, rotated_second), mask=m & ~is_q)


@triton.jit
def _silu_mul_kernel(  # type: ignore[no-untyped-def]
    p_gate_up,
    p_out,
    p_terms,
    p_adapter_rows,
    size,
    row_stride,
    BLOCK: tl.constexpr,
    TERMS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = o < size
    o_gate = row * row_stride + o
    b_gate = tl.load(p_gate_up + o_gate, mask=mask, other=0.0)
    b_up = tl.load(p_gate_up + o_gate + size, mask=mask, other=0.0)
    if TERMS:
        b_gate = _with_terms(b_gate, p_terms + o_gate, p_adapter_rows + row, mask)
        b_up = _with_terms(b_up, p_terms + o_gate + size, p_adapter_rows + row, mask)
    b_gate, b_up = b_gate.to(tl.float32), b_up.to(tl.float32)
    tl.store(p_out + row * size + o, (b_gate / (1.0 + tl.exp(-b_gate)) * b_up).to(p_out.dtype.element_ty), mask=mask)
