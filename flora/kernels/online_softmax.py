"""Triton: one step of attention over a paged context, the same for decoding rows and for prompts.

Some tokens' keys and values are read, and added to rows whose softmax is not yet known.
"""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634  # exp2 is what the hardware has


@triton.jit
def load_tokens(  # type: ignore[no-untyped-def]
    p_head,
    p_table,
    o_tokens,
    m_tokens,
    m_dim,
    page_stride,
    value_stride,
    token_stride,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    SAME_DTYPE: tl.constexpr,
):
    """(keys, values) [tokens, dim] of one KV head, zeros past m_tokens; float32 unless they have the queries' dtype."""
    page = tl.load(p_table + o_tokens // PAGE_TOKENS, mask=m_tokens, other=0)
    o_slots = page.to(tl.int64) * page_stride + o_tokens % PAGE_TOKENS * token_stride
    o_dim = tl.arange(0, BLOCK_DIM)
    m_kv = m_tokens[:, None] & m_dim[None, :]
    b_k = tl.load(p_head + o_slots[:, None] + o_dim[None, :], mask=m_kv, other=0.0)
    b_v = tl.load(p_head + value_stride + o_slots[:, None] + o_dim[None, :], mask=m_kv, other=0.0)
    if not SAME_DTYPE:
        b_k, b_v = b_k.to(tl.float32), b_v.to(tl.float32)
    return b_k, b_v


@triton.jit
def add_tokens(  # type: ignore[no-untyped-def]
    b_scores, b_v, b_max, b_sum, b_out, SEES_SOME: tl.constexpr
):
    """(b_max, b_sum, b_out) with these tokens in them: largest score, sum of the weights, weighted sum of the values.

    b_scores   float32 [rows, tokens], to base 2; -inf where a row does not attend to a token
    SEES_SOME  each row attends to one at least; else a row that never did keeps a sum of 0
    Source: FlashAttention-2 (arXiv:2307.08691), section 3.1.
    """
    b_new_max = tl.maximum(b_max, tl.max(b_scores, 1))
    if SEES_SOME:
        b_shift = b_new_max
    else:
        b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
    b_decay = tl.exp2(b_max - b_shift)
    b_p = tl.exp2(b_scores - b_shift[:, None])
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_decay[:, None], input_precision="ieee")
    return b_new_max, b_sum, b_out
