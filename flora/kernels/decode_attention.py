"""Triton: attention of sequences with one query over their paged context, split so that long contexts fill the GPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flora.kernels.context import Context, DecodeParts
from flora.kernels.decode_parts import load_part
from flora.kernels.online_softmax import LOG2_E, add_tokens, load_tokens
from flora.kernels.tuning import DecodeTuning, overlapped


def decode_attention(
    out: Tensor,
    q: Tensor,
    kv: Tensor,
    context: Context,
    parts: DecodeParts,
    softmax_scale: float,
    tuning: DecodeTuning,
    arrivals: Tensor,
    *,
    num_sms: int,
    overlap: bool,
) -> None:
    """Rows of `out` that belong to sequences with exactly one query; the other rows are left alone.

    A context of more than whole_tokens is cut every split_tokens, whoever else is in the batch, so a row's bits depend
    on its own sequence alone. Of a sequence's programs the last to arrive puts the parts together, in the order of the
    context: a launch of its own for that would have nothing to do for most sequences, which are too short for parts.

    parts     the context's, cut as the tuning says
    arrivals  int32 [num_sequences * num_kv_heads] or longer: zeros, and zeros again when the launch has ended
    Ground truth: ReferenceOps.paged_attention.  Source: FlashDecoding (2023), FlashAttention-2 (arXiv:2307.08691).
    """
    block_tables = context.block_tables
    num_sequences, max_pages = block_tables.shape
    num_q_heads, head_dim = q.shape[1:]
    page_tokens, num_kv_heads = kv.shape[2:4]
    group = num_q_heads // num_kv_heads
    max_splits = triton.cdiv(max_pages * page_tokens, tuning.split_tokens)
    if num_sequences == 0 or max_splits == 0:
        return
    partial = torch.empty(num_sequences, num_q_heads, max_splits, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(num_sequences, num_q_heads, max_splits, dtype=torch.float32, device=q.device)
    block_dim = triton.next_power_of_2(head_dim)
    # A program for each sequence, and as many again as fill the GPU: what a long context has beyond that, they share.
    spare = triton.cdiv(tuning.programs_per_sm * num_sms, num_kv_heads)
    _decode_attention_kernel[(num_kv_heads, num_sequences + min(spare, num_sequences * (max_splits - 1)))](
        q,
        kv,
        block_tables,
        parts.items,
        parts.count,
        out,
        partial,
        lse,
        arrivals,
        softmax_scale * LOG2_E,
        max_splits,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        *kv.stride()[:4],
        block_tables.stride(0),
        PAGE_TOKENS=page_tokens,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_HEADS=max(16, triton.next_power_of_2(group)),
        BLOCK_DIM=block_dim,
        BLOCK_TOKENS=tuning.block_tokens,
        SPLIT_TOKENS=tuning.split_tokens,
        WHOLE_TOKENS=tuning.uncut_tokens,
        SAME_DTYPE=q.dtype == kv.dtype,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        **overlapped(overlap),
    )


@triton.jit
def _decode_attention_kernel(  # type: ignore[no-untyped-def]
    p_q,
    p_kv,
    p_tables,
    p_parts,
    p_num_parts,
    p_out,
    p_partial,
    p_lse,
    p_arrivals,
    scale_log2,
    max_splits,
    q_row_stride,
    q_head_stride,
    out_row_stride,
    out_head_stride,
    page_stride,
    value_stride,
    token_stride,
    head_stride,
    table_stride,
    PAGE_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,  # the group padded to what tl.dot takes
    BLOCK_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    WHOLE_TOKENS: tl.constexpr,
    SAME_DTYPE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    i_kv_head = tl.program_id(0)  # neighbours read neighbouring heads of the same tokens
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    o_heads = tl.arange(0, BLOCK_HEADS)
    m_heads = o_heads < GROUP
    heads = i_kv_head * GROUP + o_heads
    o_dim = tl.arange(0, BLOCK_DIM)
    m_dim = o_dim < HEAD_DIM
    m_q = m_heads[:, None] & m_dim[None, :]
    p_head = p_kv + i_kv_head.to(tl.int64) * head_stride
    num_heads = tl.num_programs(0) * GROUP
    # The first part is read while the number of parts still travels.
    i_first = tl.program_id(1)
    i_seq, i_split, row, seq_len = load_part(p_parts, i_first)
    for i in range(i_first, tl.load(p_num_parts), tl.num_programs(1)):
        if i != i_first:
            i_seq, i_split, row, seq_len = load_part(p_parts, i)
        p_q_row = p_q + row.to(tl.int64) * q_row_stride
        b_q = tl.load(p_q_row + heads[:, None] * q_head_stride + o_dim[None, :], mask=m_q, other=0.0)
        p_table = p_tables + i_seq.to(tl.int64) * table_stride
        b_max = tl.full((BLOCK_HEADS,), float("-inf"), tl.float32)
        b_sum = tl.zeros((BLOCK_HEADS,), tl.float32)
        b_out = tl.zeros((BLOCK_HEADS, BLOCK_DIM), tl.float32)
        end = tl.minimum(seq_len, (i_split + 1) * SPLIT_TOKENS)
        if WHOLE_TOKENS > SPLIT_TOKENS:
            end = tl.where(seq_len <= WHOLE_TOKENS, seq_len, end)
        for first in range(i_split * SPLIT_TOKENS, end, BLOCK_TOKENS):
            o_tokens = first + tl.arange(0, BLOCK_TOKENS)
            m_tokens = o_tokens < end
            b_k, b_v = load_tokens(
                p_head, p_table, o_tokens, m_tokens, m_dim, page_stride, value_stride, token_stride, PAGE_TOKENS,
                BLOCK_DIM, SAME_DTYPE,
            )  # fmt: skip
            b_scores = tl.dot(b_q.to(b_k.dtype), tl.trans(b_k), input_precision="ieee") * scale_log2
            b_scores = tl.where(m_tokens[None, :], b_scores, float("-inf"))
            b_max, b_sum, b_out = add_tokens(b_scores, b_v, b_max, b_sum, b_out, SEES_SOME=True)
        b_out = tl.where(seq_len > 0, b_out / b_sum[:, None], 0.0)
        p_row = p_out + row.to(tl.int64) * out_row_stride + heads[:, None] * out_head_stride
        if seq_len <= WHOLE_TOKENS:
            tl.store(p_row + o_dim[None, :], b_out.to(p_out.dtype.element_ty), mask=m_q)
        else:
            num_splits = tl.cdiv(seq_len, SPLIT_TOKENS)
            i_partial = (i_seq.to(tl.int64) * num_heads + heads) * max_splits
            p_parts_of_row = p_partial + i_partial[:, None] * HEAD_DIM + o_dim[None, :]
            tl.store(p_parts_of_row + i_split * HEAD_DIM, b_out, mask=m_q)
            tl.store(p_lse + i_partial + i_split, b_max + tl.log2(b_sum), mask=m_heads)
            tl.debug_barrier()  # every thread's part is written before the program says so
            p_arrived = p_arrivals + i_seq * tl.num_programs(0) + i_kv_head
            if tl.atomic_add(p_arrived, 1, sem="acq_rel") + 1 == num_splits:
                tl.store(p_arrived, 0)
                b_joined = _join_splits(p_parts_of_row, p_lse + i_partial, num_splits, m_q, m_heads, HEAD_DIM)
                tl.store(p_row + o_dim[None, :], b_joined.to(p_out.dtype.element_ty), mask=m_q)


@triton.jit
def _join_splits(p_parts, p_lse, num_splits, m_parts, m_heads, HEAD_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 [heads, dim]: the parts, each weighted by its share of the softmax. They are other programs', so they are
    read past the L1 cache.
    """
    b_max = tl.load(p_lse, mask=m_heads, other=0.0, cache_modifier=".cg")
    b_sum = tl.full(b_max.shape, 1.0, tl.float32)
    b_out = tl.load(p_parts, mask=m_parts, other=0.0, cache_modifier=".cg")
    for i_split in range(1, num_splits):
        b_lse = tl.load(p_lse + i_split, mask=m_heads, other=0.0, cache_modifier=".cg")
        b_part = tl.load(p_parts + i_split * HEAD_DIM, mask=m_parts, other=0.0, cache_modifier=".cg")
        b_new_max = tl.maximum(b_max, b_lse)
        b_decay = tl.exp2(b_max - b_new_max)
        b_weight = tl.exp2(b_lse - b_new_max)
        b_out = b_out * b_decay[:, None] + b_part * b_weight[:, None]
        b_sum = b_sum * b_decay + b_weight
        b_max = b_new_max
    return b_out / b_sum[:, None]
