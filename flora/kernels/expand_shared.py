"""Triton: expand's way for segments of up to 16 rows: each weight is read once, and multiplied by tensor cores.

A tile of B is on its way while the one before it is multiplied, and the first ones while shrink ends. Outputs are the
product's rows and the step's rows its columns, of which a tensor core takes eight at a time: with few rows little of it
is idle, and a row's bits do not depend on the columns beside it. v is taken in two terms of the product's dtype, a
product that keeps twice its digits.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from flora.kernels.lora_shrink import as_factor, matrix_offsets


@triton.jit
def expand_whole_rank(  # type: ignore[no-untyped-def]
    p_y, p_v, p_pool, p_slot_cells, n_chunk, row_chunks, cell_chunks, rank, scale, width, num_rows, y_row_stride,
    v_split_stride, v_row_stride, ADD: tl.constexpr, DTYPE: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
    RANK: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`width` outputs of rows that share an adapter of at most RANK: v is read once for all of them.

    p_y, p_v  the first row's; p_y at the first output, whose column of B begins at the chunk `n_chunk`

    The wait for shrink is inside the loop: before the loop, it would hold up the first tiles of B. The first of y are
    then read ahead of it, too, so whoever wrote y must have ended when shrink began.
    """
    o_rows = tl.arange(0, ROWS)
    m_rows = (o_rows < num_rows)[None, :]
    o_n = tl.arange(0, BLOCK_N)
    o_j = tl.arange(0, RANK)
    m_j = o_j < rank
    o_b = matrix_offsets(p_slot_cells, n_chunk, row_chunks, cell_chunks, o_j, m_j)
    p_b = p_pool + o_b[None, :] + o_n[:, None]
    p_out = p_y + o_rows[None, :] * y_row_stride + o_n[:, None]
    b_high = tl.zeros((RANK, ROWS), DTYPE)
    b_low = tl.zeros((RANK, ROWS), DTYPE)
    for part in tl.range(0, width, BLOCK_N, num_stages=STAGES):
        m_n = (part + o_n < width)[:, None]
        b_b = tl.load(p_b + part, mask=m_n & m_j[None, :], other=0.0)
        if part == 0:
            if OVERLAP:
                gdc_wait()
            b_high, b_low = two_terms(
                p_v + o_rows[None, :] * v_row_stride, m_rows, o_j, rank, v_split_stride, SPLITS, DTYPE
            )
        if ADD:
            b_y = tl.load(p_out + part, mask=m_n & m_rows, other=0.0)
        b_delta = multiply(tl.zeros((BLOCK_N, ROWS), tl.float32), as_factor(b_b, DTYPE), b_high, b_low)
        b_delta *= scale
        if ADD:
            b_delta += b_y.to(tl.float32)
        tl.store(p_out + part, b_delta.to(p_y.dtype.element_ty), mask=m_n & m_rows)


@triton.jit
def expand_by_rank(  # type: ignore[no-untyped-def]
    p_y, p_v, p_pool, p_slot_cells, n_chunk, row_chunks, cell_chunks, rank, scale, width, num_rows, y_row_stride,
    v_split_stride, v_row_stride, ADD: tl.constexpr, DTYPE: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
    RANK: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The same for any rank, RANK after RANK."""
    o_rows = tl.arange(0, ROWS)
    m_rows = (o_rows < num_rows)[None, :]
    o_n = tl.arange(0, BLOCK_N)
    p_out = p_y + o_rows[None, :] * y_row_stride + o_n[:, None]
    if OVERLAP:
        gdc_wait()
    for part in range(0, width, BLOCK_N):
        m_n = (part + o_n < width)[:, None]
        b_delta = tl.zeros((BLOCK_N, ROWS), tl.float32)
        for j in tl.range(0, rank, RANK, num_stages=1):
            o_j = j + tl.arange(0, RANK)
            m_j = o_j < rank
            o_b = matrix_offsets(p_slot_cells, n_chunk, row_chunks, cell_chunks, o_j, m_j)
            b_b = tl.load(p_pool + o_b[None, :] + (part + o_n)[:, None], mask=m_n & m_j[None, :], other=0.0)
            b_high, b_low = two_terms(
                p_v + o_rows[None, :] * v_row_stride, m_rows, o_j, rank, v_split_stride, SPLITS, DTYPE,
            )  # fmt: skip
            b_delta = multiply(b_delta, as_factor(b_b, DTYPE), b_high, b_low)
        b_delta *= scale
        if ADD:
            b_delta += tl.load(p_out + part, mask=m_n & m_rows, other=0.0).to(tl.float32)
        tl.store(p_out + part, b_delta.to(p_y.dtype.element_ty), mask=m_n & m_rows)


@triton.jit
def two_terms(  # type: ignore[no-untyped-def]
    p_rows_v, m_rows, o_j, rank, v_split_stride, SPLITS: tl.constexpr, DTYPE: tl.constexpr
):
    """(high, low) [rank, rows] in DTYPE: v summed over its partials, and what its rounding leaves of it."""
    m_v = m_rows & (o_j < rank)[:, None]
    p_v = p_rows_v + o_j[:, None]
    b_v = tl.load(p_v, mask=m_v, other=0.0)
    for s in tl.static_range(1, SPLITS):
        b_v += tl.load(p_v + s * v_split_stride, mask=m_v, other=0.0)
    b_high = b_v.to(DTYPE)
    return b_high, (b_v - b_high.to(tl.float32)).to(DTYPE)


@triton.jit
def multiply(b_delta, b_b, b_high, b_low):  # type: ignore[no-untyped-def]
    b_delta = tl.dot(b_b, b_high, b_delta, input_precision="ieee")
    if b_b.dtype != tl.float32:
        b_delta = tl.dot(b_b, b_low, b_delta, input_precision="ieee")
    return b_delta
