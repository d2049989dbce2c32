"""Triton: expand's way for segments of few rows whose factors are fp8, two outputs at a time.

A tensor core wants B's numbers of one output side by side, and they lie output by output. What turns a tile around on
its way from shared memory moves 16 bits at once, so two neighbouring outputs of one rank travel as one number, and are
taken apart in registers. y is read and written in the same pairs.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from flora.kernels.expand_shared import multiply, two_terms
from flora.kernels.lora_shrink import as_factor, matrix_offsets


@triton.jit
def expand_whole_rank_in_pairs(  # type: ignore[no-untyped-def]
    p_y, p_v, p_pool, p_slot_cells, n_chunk, row_chunks, cell_chunks, rank, scale, width, num_rows, y_row_stride,
    v_split_stride, v_row_stride, ADD: tl.constexpr, DTYPE: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
    RANK: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """See expand_whole_rank. y of 16 bits, its outputs an even number from an even one on; B in float8_e4m3fn."""
    o_rows = tl.arange(0, ROWS)
    m_rows = (o_rows < num_rows)[None, :]
    o_pair = tl.arange(0, BLOCK_N // 2)
    o_j = tl.arange(0, RANK)
    m_j = o_j < rank
    o_b = matrix_offsets(p_slot_cells, n_chunk, row_chunks, cell_chunks, o_j, m_j) // 2
    p_b = p_pool.to(tl.pointer_type(tl.int16)) + o_b[None, :] + o_pair[:, None]
    p_out = p_y.to(tl.pointer_type(tl.int32)) + o_rows[None, :] * (y_row_stride // 2) + o_pair[:, None]
    b_high = tl.zeros((RANK, ROWS), DTYPE)
    b_low = tl.zeros((RANK, ROWS), DTYPE)
    for part in tl.range(0, width // 2, BLOCK_N // 2, num_stages=STAGES):
        m_out = (part + o_pair < width // 2)[:, None]
        b_b = tl.load(p_b + part, mask=m_out & m_j[None, :], other=0)
        m_out &= m_rows
        if part == 0:
            if OVERLAP:
                gdc_wait()
            b_high, b_low = two_terms(
                p_v + o_rows[None, :] * v_row_stride, m_rows, o_j, rank, v_split_stride, SPLITS, DTYPE
            )
        b_even, b_odd = _first(b_b, tl.float8e4nv), _second(b_b, tl.float8e4nv)
        zeros = tl.zeros((BLOCK_N // 2, ROWS), tl.float32)
        b_even = multiply(zeros, as_factor(b_even, DTYPE), b_high, b_low) * scale
        b_odd = multiply(zeros, as_factor(b_odd, DTYPE), b_high, b_low) * scale
        if ADD:
            b_y = tl.load(p_out + part, mask=m_out, other=0)
            b_even += _first(b_y, p_y.dtype.element_ty).to(tl.float32)
            b_odd += _second(b_y, p_y.dtype.element_ty).to(tl.float32)
        tl.store(p_out + part, _paired(b_even.to(p_y.dtype.element_ty), b_odd.to(p_y.dtype.element_ty)), mask=m_out)


@triton.jit
def _first(b_pair, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of two numbers of DTYPE in one integer of twice their size, the one at the lower address."""
    if b_pair.dtype == tl.int32:
        return b_pair.to(tl.int16).to(DTYPE, bitcast=True)
    else:
        return b_pair.to(tl.int8).to(DTYPE, bitcast=True)


@triton.jit
def _second(b_pair, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    if b_pair.dtype == tl.int32:
        return (b_pair >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        return (b_pair >> 8).to(tl.int8).to(DTYPE, bitcast=True)


@triton.jit
def _paired(b_first, b_second):  # type: ignore[no-untyped-def]
    """Two numbers of 16 bits as one int32."""
    b_first = b_first.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return b_first | (b_second.to(tl.int16, bitcast=True).to(tl.int32) << 16)
