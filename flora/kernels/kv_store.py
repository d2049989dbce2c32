"""Triton: this step's keys and values into their slots of the paged cache."""

import triton
import triton.language as tl
from torch import Tensor


def store_kv(k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> None:
    """See Ops.store_kv.  Ground truth: ReferenceOps.store_kv."""
    n, num_heads, head_dim = k.shape
    if n == 0:
        return
    _store_kv_kernel[(n,)](
        k,
        v,
        kv,
        slots,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        *kv.stride()[:4],
        PAGE_TOKENS=kv.shape[2],
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK=triton.next_power_of_2(num_heads * head_dim),
    )


@triton.jit
def _store_kv_kernel(  # type: ignore[no-untyped-def]
    p_k,
    p_v,
    p_kv,
    p_slots,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    page_stride,
    value_stride,
    token_stride,
    head_stride,
    PAGE_TOKENS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(p_slots + row)
    if slot >= 0:
        o = tl.arange(0, BLOCK)
        mask = o < NUM_HEADS * HEAD_DIM
        o_head, o_dim = o // HEAD_DIM, o % HEAD_DIM
        # slot is int64, and with it every offset: a plane may pass 2**31 elements
        p_slot = p_kv + slot // PAGE_TOKENS * page_stride + slot % PAGE_TOKENS * token_stride
        p_slot += o_head * head_stride + o_dim
        b_k = tl.load(p_k + row * k_row_stride + o_head * k_head_stride + o_dim, mask=mask)
        b_v = tl.load(p_v + row * v_row_stride + o_head * v_head_stride + o_dim, mask=mask)
        tl.store(p_slot, b_k, mask=mask)
        tl.store(p_slot + value_stride, b_v, mask=mask)
