"""Triton: expand's way for segments of many rows, by tensor cores.

v is taken in two terms of the product's dtype, a product that keeps twice its digits.
"""

import triton
import triton.language as tl

from flora.kernels.lora_shrink import as_factor, matrix_offsets


@triton.jit
def expand_rows(  # type: ignore[no-untyped-def]
    p_y, p_v, p_pool, p_slot_cells, b_chunk, row_chunks, cell_chunks, rank, scale, n, size, num_rows, y_row_stride,
    v_split_stride, v_row_stride, ADD: tl.constexpr, DTYPE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_RANK: tl.constexpr, VECTOR_N: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One item of lora_expand: rows that share an adapter, VECTOR_N outputs from n on, BLOCK_N at a time.

    v has twice the bytes of an output tile for each of its partials, so ranks of one block read it once for all tiles.
    """
    if (rank > 0) & (rank <= BLOCK_RANK):  # without one there is no v to read
        rows = tl.arange(0, BLOCK_ROWS).to(tl.int64)
        m_rows = (rows < num_rows)[:, None]
        p_tile_y = p_y + rows[:, None] * y_row_stride + n
        left = size - n
        b_high, b_low = _two_terms(
            p_v + rows[:, None] * v_row_stride, m_rows, 0, v_split_stride, SPLITS, BLOCK_RANK, DTYPE
        )
        o_j = tl.arange(0, BLOCK_RANK)
        m_j = o_j < rank
        o_b = matrix_offsets(p_slot_cells, b_chunk + n // 64, row_chunks, cell_chunks, o_j, m_j)
        for part in range(0, VECTOR_N, BLOCK_N):
            b_delta = tl.zeros((BLOCK_ROWS, BLOCK_N), tl.float32)
            b_delta = _add_block(b_delta, b_high, b_low, p_pool + o_b, m_j, part, left, BLOCK_N)
            _store_tile(p_tile_y, m_rows, part, left, scale, b_delta, ADD, BLOCK_N)
    else:
        expand_rows_by_block(
            p_y, p_v, p_pool, p_slot_cells, b_chunk, row_chunks, cell_chunks, rank, scale, n, size, num_rows,
            y_row_stride, v_split_stride, v_row_stride, ADD, DTYPE, SPLITS, BLOCK_ROWS, BLOCK_RANK, VECTOR_N, BLOCK_N,
        )  # fmt: skip


@triton.jit
def expand_rows_by_block(  # type: ignore[no-untyped-def]
    p_y, p_v, p_pool, p_slot_cells, b_chunk, row_chunks, cell_chunks, rank, scale, n, size, num_rows, y_row_stride,
    v_split_stride, v_row_stride, ADD: tl.constexpr, DTYPE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_RANK: tl.constexpr, VECTOR_N: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same for any rank, one block after another."""
    rows = tl.arange(0, BLOCK_ROWS).to(tl.int64)
    m_rows = (rows < num_rows)[:, None]
    p_rows_v = p_v + rows[:, None] * v_row_stride
    p_tile_y = p_y + rows[:, None] * y_row_stride + n
    left = size - n
    n_chunk = b_chunk + n // 64
    for part in range(0, tl.minimum(VECTOR_N, left), BLOCK_N):
        b_delta = tl.zeros((BLOCK_ROWS, BLOCK_N), tl.float32)
        for j in range(0, rank, BLOCK_RANK):
            b_high, b_low = _two_terms(p_rows_v, m_rows, j, v_split_stride, SPLITS, BLOCK_RANK, DTYPE)
            o_j = j + tl.arange(0, BLOCK_RANK)
            m_j = o_j < rank
            o_b = matrix_offsets(p_slot_cells, n_chunk, row_chunks, cell_chunks, o_j, m_j)
            b_delta = _add_block(b_delta, b_high, b_low, p_pool + o_b, m_j, part, left, BLOCK_N)
        _store_tile(p_tile_y, m_rows, part, left, scale, b_delta, ADD, BLOCK_N)


@triton.jit
def _two_terms(  # type: ignore[no-untyped-def]
    p_rows_v, m_rows, j, v_split_stride, SPLITS: tl.constexpr, BLOCK_RANK: tl.constexpr, DTYPE: tl.constexpr
):
    """(high, low) [rows, BLOCK_RANK] in DTYPE: v summed over its partials, and what its rounding leaves of it."""
    o_j = j + tl.arange(0, BLOCK_RANK)
    b_v = tl.load(p_rows_v + o_j[None, :], mask=m_rows, other=0.0)
    for s in range(1, SPLITS):
        b_v += tl.load(p_rows_v + s * v_split_stride + o_j[None, :], mask=m_rows, other=0.0)
    b_high = b_v.to(DTYPE)
    return b_high, (b_v - b_high.to(tl.float32)).to(DTYPE)


@triton.jit
def _add_block(  # type: ignore[no-untyped-def]
    b_delta, b_high, b_low, p_rows_b, m_j, part, left, BLOCK_N: tl.constexpr
):
    """b_delta [rows, BLOCK_N] plus (high + low) times a block of B's rows, from the column `part` on."""
    o_n = part + tl.arange(0, BLOCK_N)
    b_b = tl.load(p_rows_b[:, None] + o_n[None, :], mask=m_j[:, None] & (o_n < left)[None, :], other=0.0)
    b_b = as_factor(b_b, b_high.dtype)
    b_delta = tl.dot(b_high, b_b, b_delta, input_precision="ieee")
    if b_b.dtype != tl.float32:
        b_delta = tl.dot(b_low, b_b, b_delta, input_precision="ieee")
    return b_delta


@triton.jit
def _store_tile(  # type: ignore[no-untyped-def]
    p_rows_y, m_rows, part, left, scale, b_delta, ADD: tl.constexpr, BLOCK_N: tl.constexpr
):
    o_n = part + tl.arange(0, BLOCK_N)
    p_out = p_rows_y + o_n[None, :]
    m_out = m_rows & (o_n < left)[None, :]
    DTYPE: tl.constexpr = p_rows_y.dtype.element_ty
    b_y = tl.zeros(b_delta.shape, DTYPE)
    if ADD:
        b_y = tl.load(p_out, mask=m_out, other=0.0)
    tl.store(p_out, (b_y.to(tl.float32) + scale * b_delta).to(DTYPE), mask=m_out)
