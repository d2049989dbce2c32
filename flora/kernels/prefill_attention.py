"""Triton: causal attention of sequences with several queries over their paged context."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flora.kernels.context import Context
from flora.kernels.online_softmax import LOG2_E, add_tokens, load_tokens
from flora.kernels.tuning import WIDE_HEADS, PrefillTuning, grid_size, overlapped


def prefill_attention(
    out: Tensor,
    q: Tensor,
    kv: Tensor,
    context: Context,
    softmax_scale: float,
    tuning: PrefillTuning,
    *,
    min_queries: int = 2,
    num_sms: int,
    overlap: bool,
) -> None:
    """Rows of `out` that belong to sequences with `min_queries` or more, 1 or 2; the other rows are left alone.

    Only sequences within `context.prefill_range` have so many. A captured step has room for hundreds of sequences and
    mostly a few prompts: their tiles are then the only ones.

    The query heads of one KV head share its tile: row r of a tile is token r // group, head r % group.
    Ground truth: ReferenceOps.paged_attention.  Source: FlashAttention-2 (arXiv:2307.08691).
    """
    block_tables, query_starts = context.block_tables, context.query_starts
    num_sequences = block_tables.shape[0]
    num_q_heads, head_dim = q.shape[1:]
    page_tokens, num_kv_heads = kv.shape[2:4]
    group = num_q_heads // num_kv_heads
    block_dim = triton.next_power_of_2(head_dim)
    if block_dim * kv.element_size() > tuning.max_head_bytes:
        tuning = WIDE_HEADS
    block_rows = max(tuning.block_rows, triton.next_power_of_2(group))
    tile_tokens = block_rows // group
    if num_sequences == 0 or q.shape[0] == 0:
        return
    # Sequence s starts at tile query_starts[s] // tile_tokens + s, both counted from the range's first: no two overlap,
    # and n and S alone bound the number of tiles.
    items = (q.shape[0] // tile_tokens + num_sequences) * num_kv_heads
    _prefill_kernel[(grid_size(items, tuning.programs_per_sm, num_sms),)](
        q,
        kv,
        block_tables,
        context.seq_lens,
        query_starts,
        query_starts if context.prefill_range is None else context.prefill_range,
        out,
        softmax_scale * LOG2_E,
        num_sequences,
        num_kv_heads,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        *kv.stride()[:4],
        block_tables.stride(0),
        HAS_RANGE=context.prefill_range is not None,
        MIN_QUERIES=min_queries,
        PAGE_TOKENS=page_tokens,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_ROWS=block_rows,
        TILE_TOKENS=tile_tokens,
        BLOCK_DIM=block_dim,
        BLOCK_TOKENS=tuning.block_tokens,
        SAME_DTYPE=q.dtype == kv.dtype,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        **overlapped(overlap),
    )


@triton.jit
def _prefill_kernel(  # type: ignore[no-untyped-def]
    p_q,
    p_kv,
    p_tables,
    p_seq_lens,
    p_starts,
    p_range,
    p_out,
    scale_log2,
    num_sequences,
    num_kv_heads,
    q_row_stride,
    q_head_stride,
    out_row_stride,
    out_head_stride,
    page_stride,
    value_stride,
    token_stride,
    head_stride,
    table_stride,
    HAS_RANGE: tl.constexpr,
    MIN_QUERIES: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SAME_DTYPE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    first_seq = tl.program_id(0) * 0
    end_seq = first_seq + num_sequences
    if HAS_RANGE:
        first_seq, end_seq = tl.load(p_range), tl.load(p_range + 1)
    first_start = tl.load(p_starts + first_seq)
    num_tiles = (tl.load(p_starts + end_seq) - first_start) // TILE_TOKENS + end_seq - first_seq
    for item in range(tl.program_id(0), num_tiles * num_kv_heads, tl.num_programs(0)):
        i_tile, i_kv_head = item // num_kv_heads, item % num_kv_heads
        low, high = first_seq, end_seq  # the last sequence that starts at or before this tile lies in [low, high)
        while high - low > 1:
            middle = (low + high) // 2
            if (tl.load(p_starts + middle) - first_start) // TILE_TOKENS + middle - first_seq <= i_tile:
                low = middle
            else:
                high = middle
        i_seq = low
        query_start = tl.load(p_starts + i_seq)
        num_queries = tl.load(p_starts + i_seq + 1) - query_start
        seq_len = tl.load(p_seq_lens + i_seq)
        first_query = (i_tile - (query_start - first_start) // TILE_TOKENS - (i_seq - first_seq)) * TILE_TOKENS
        if num_queries >= MIN_QUERIES and first_query < num_queries:
            o_rows = tl.arange(0, BLOCK_ROWS)
            o_queries = first_query + o_rows // GROUP
            m_rows = (o_rows < TILE_TOKENS * GROUP) & (o_queries < num_queries)
            positions = seq_len - num_queries + o_queries
            heads = i_kv_head * GROUP + o_rows % GROUP
            rows = (query_start + o_queries).to(tl.int64)
            o_dim = tl.arange(0, BLOCK_DIM)
            m_dim = o_dim < HEAD_DIM
            m_q = m_rows[:, None] & m_dim[None, :]
            p_rows = p_q + rows * q_row_stride + heads * q_head_stride
            b_q = tl.load(p_rows[:, None] + o_dim[None, :], mask=m_q, other=0.0)
            b_max = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
            b_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
            b_out = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float32)
            p_head = p_kv + i_kv_head.to(tl.int64) * head_stride
            p_table = p_tables + i_seq.to(tl.int64) * table_stride
            end = tl.minimum(seq_len, seq_len - num_queries + first_query + TILE_TOKENS)
            for first in range(0, end, BLOCK_TOKENS):
                o_tokens = first + tl.arange(0, BLOCK_TOKENS)
                m_tokens = o_tokens < end
                b_k, b_v = load_tokens(
                    p_head, p_table, o_tokens, m_tokens, m_dim, page_stride, value_stride, token_stride, PAGE_TOKENS,
                    BLOCK_DIM, SAME_DTYPE,
                )  # fmt: skip
                b_scores = tl.dot(b_q.to(b_k.dtype), tl.trans(b_k), input_precision="ieee") * scale_log2
                m_seen = (o_tokens[None, :] <= positions[:, None]) & m_tokens[None, :]
                b_scores = tl.where(m_seen, b_scores, float("-inf"))
                b_max, b_sum, b_out = add_tokens(b_scores, b_v, b_max, b_sum, b_out, SEES_SOME=False)
            b_out = tl.where(b_sum[:, None] > 0, b_out / b_sum[:, None], 0.0)
            p_rows = p_out + rows * out_row_stride + heads * out_head_stride
            tl.store(p_rows[:, None] + o_dim[None, :], b_out.to(p_out.dtype.element_ty), mask=m_q)
