"""Triton: y += scale * v @ B.T for every row's own adapter, in place."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from flora.kernels.expand_rows import expand_rows, expand_rows_by_block
from flora.kernels.lora_shrink import load_segment, matrix_offsets
from flora.kernels.modules import CHUNK, MODULES, Place, row_alignment
from flora.kernels.tuning import LoraTuning, grid_size, overlapped
from flora.kernels.weights import AdapterWeights
from flora.kernels.work import FEW_ROWS, WorkList


def lora_expand(
    y: Tensor,
    v: Tensor,
    weights: AdapterWeights,
    place: Place,
    work: WorkList,
    tuning: LoraTuning,
    *,
    num_sms: int,
    overlap: bool,
    add: bool = True,
) -> None:
    """y[i, slice s] += scale_s * v[i, s] @ B_s.T, v summed over its partials. In fp16, v must lie in fp16's range.

    v        [splits, n, num_slices, width], what this room's Triton lora_shrink returned for the same rows and tuning
    overlap  may start while the launch before it on the stream ends
    add      False: = instead of +=, and 0 where a row's adapter leaves out the module
    Ground truth: ReferenceOps.lora_expand.  Source: Punica (arXiv:2310.18547), SGMV.
    """
    most_n = min(row_alignment(weights.alignment, size) for size in place.out_sizes)
    vector_n = min(tuning.expand_vector_n, most_n)
    small_rank = tuning.expand_small_rank if 2 * vector_n <= most_n else 0
    tiles = sum(triton.cdiv(size, vector_n) for size in place.out_sizes)
    items = work.segments.shape[0] * tiles
    if items == 0 or y.shape[0] == 0:
        return
    absent = [0] * (3 - len(place.out_sizes))
    has_few = work.block_rows <= FEW_ROWS or work.num_wide is not None
    starts, sizes = (*place.out_starts, *absent), (*place.out_sizes, *absent)
    _lora_expand_kernel[(grid_size(items, tuning.programs_per_sm, num_sms),)](
        y,
        v,
        weights.pool,
        weights.cells,
        weights.modules,
        weights.scales,
        work.segments,
        work.num_segments,
        work.num_segments if work.num_wide is None else work.num_wide,
        *starts,
        *sizes,
        weights.pool.shape[1] // CHUNK,
        place.layer * len(MODULES) + place.group.value[0],
        y.stride(0),
        *v.stride()[:3],
        weights.cells.stride(0),
        weights.modules.stride(0),
        weights.scales.stride(0),
        SPLITS=v.shape[0],
        FEW=work.block_rows <= FEW_ROWS,
        MIXED=work.num_wide is not None,
        ADD=add,
        VECTOR_N=vector_n,
        MATRIX_N=min(tuning.expand_matrix_n, vector_n),
        BLOCK_ROWS=max(16, triton.next_power_of_2(work.block_rows)),
        BLOCK_RANK=tuning.block_rank,
        SMALL_RANK=small_rank,
        num_warps=tuning.expand_warps,
        num_stages=tuning.expand_stages,
        maxnreg=tuning.expand_registers,
        enable_fp_fusion=not has_few,
        **overlapped(overlap),
    )


@triton.jit(do_not_specialize=["first_module"])  # as in shrink: one kernel for every layer
def _lora_expand_kernel(  # type: ignore[no-untyped-def]
    p_y,
    p_v,
    p_pool,
    p_cells,
    p_modules,
    p_scales,
    p_segments,
    p_num_segments,
    p_num_wide,
    start_0,
    start_1,
    start_2,
    size_0,
    size_1,
    size_2,
    cell_chunks,
    first_module,
    y_row_stride,
    v_split_stride,
    v_row_stride,
    v_slice_stride,
    cells_slot_stride,
    modules_slot_stride,
    scales_slot_stride,
    SPLITS: tl.constexpr,
    FEW: tl.constexpr,  # segments have at most four rows
    MIXED: tl.constexpr,  # those behind the first num_wide have
    ADD: tl.constexpr,  # to what y holds
    VECTOR_N: tl.constexpr,  # outputs per item
    MATRIX_N: tl.constexpr,  # outputs per tensor core product
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    SMALL_RANK: tl.constexpr,  # up to which an adapter goes a way of its own, whoever else is there
    OVERLAP: tl.constexpr,  # launched before shrink has ended (programmatic dependent launch)
):
    tl.static_assert(VECTOR_N % 64 == 0, "an item begins with a chunk")
    tiles_0 = tl.cdiv(size_0, VECTOR_N)
    tiles_1 = tl.cdiv(size_1, VECTOR_N)
    num_tiles = tiles_0 + tiles_1 + tl.cdiv(size_2, VECTOR_N)
    i_first = tl.program_id(0)
    slot, first_row, num_rows = load_segment(p_segments, i_first // num_tiles)
    num_items = tl.load(p_num_segments) * num_tiles
    if MIXED:
        num_wide = tl.load(p_num_wide)
    for item in range(i_first, num_items, tl.num_programs(0)):
        if item != i_first:
            slot, first_row, num_rows = load_segment(p_segments, item // num_tiles)
        i_tile = item % num_tiles
        i_slice = (i_tile >= tiles_0).to(tl.int32) + (i_tile >= tiles_0 + tiles_1).to(tl.int32)
        start = tl.where(i_slice == 0, start_0, tl.where(i_slice == 1, start_1, start_2))
        size = tl.where(i_slice == 0, size_0, tl.where(i_slice == 1, size_1, size_2))
        i_tile -= tl.where(i_slice == 0, 0, tl.where(i_slice == 1, tiles_0, tiles_0 + tiles_1))

        p_record = p_modules + slot * modules_slot_stride + (first_module + i_slice) * 3
        rank = tl.load(p_record)
        b_chunk = tl.load(p_record + 2)
        scale = tl.load(p_scales + slot * scales_slot_stride + first_module + i_slice)
        p_slot_cells = p_cells + slot * cells_slot_stride
        p_rows_v = p_v + first_row * v_row_stride + i_slice * v_slice_stride
        p_rows_y = p_y + first_row * y_row_stride + start
        row_chunks = tl.cdiv(size, 64)
        n = i_tile * VECTOR_N
        if OVERLAP:
            gdc_wait()
        if (rank > 0) | (not ADD):
            scale = tl.where(rank > 0, scale, 0.0)
            if MIXED:
                if item // num_tiles < num_wide:
                    expand_rows_by_block(
                        p_rows_y, p_rows_v, p_pool, p_slot_cells, b_chunk, row_chunks, cell_chunks, rank, scale, n,
                        size, num_rows, y_row_stride, v_split_stride, v_row_stride, ADD, SPLITS, BLOCK_ROWS, BLOCK_RANK,
                        VECTOR_N, MATRIX_N,
                    )  # fmt: skip
                else:
                    _expand_few(
                        p_rows_y, p_rows_v, p_pool, p_slot_cells, b_chunk, row_chunks, cell_chunks, rank, scale,
                        i_tile, size, num_rows, y_row_stride, v_split_stride, v_row_stride, ADD, SPLITS, BLOCK_RANK,
                        SMALL_RANK, VECTOR_N,
                    )  # fmt: skip
            elif FEW:
                _expand_few(
                    p_rows_y, p_rows_v, p_pool, p_slot_cells, b_chunk, row_chunks, cell_chunks, rank, scale,
                    i_tile, size, num_rows, y_row_stride, v_split_stride, v_row_stride, ADD, SPLITS, BLOCK_RANK,
                    SMALL_RANK, VECTOR_N,
                )  # fmt: skip
            else:
                expand_rows(
                    p_rows_y, p_rows_v, p_pool, p_slot_cells, b_chunk, row_chunks, cell_chunks, rank, scale, n, size,
                    num_rows, y_row_stride, v_split_stride, v_row_stride, ADD, SPLITS, BLOCK_ROWS, BLOCK_RANK,
                    VECTOR_N, MATRIX_N,
                )  # fmt: skip


@triton.jit
def _expand_few(  # type: ignore[no-untyped-def]
    p_rows_y, p_rows_v, p_pool, p_slot_cells, b_chunk, row_chunks, cell_chunks, rank, scale, i_tile, size, num_rows,
    y_row_stride, v_split_stride, v_row_stride, ADD: tl.constexpr, SPLITS: tl.constexpr, BLOCK_RANK: tl.constexpr,
    SMALL_RANK: tl.constexpr, VECTOR_N: tl.constexpr,
):  # fmt: skip
    """One item of a segment of up to four rows. One row and two go ways of their own."""
    if num_rows == 1:
        _expand_item(
            p_rows_y, p_rows_v, p_pool, p_slot_cells, b_chunk, row_chunks, cell_chunks, rank, scale, i_tile, size,
            num_rows, y_row_stride, v_split_stride, v_row_stride, 1, ADD, SPLITS, BLOCK_RANK, SMALL_RANK, VECTOR_N,
        )  # fmt: skip
    elif num_rows == 2:
        _expand_item(
            p_rows_y, p_rows_v, p_pool, p_slot_cells, b_chunk, row_chunks, cell_chunks, rank, scale, i_tile, size,
            num_rows, y_row_stride, v_split_stride, v_row_stride, 2, ADD, SPLITS, BLOCK_RANK, SMALL_RANK, VECTOR_N,
        )  # fmt: skip
    else:
        _expand_item(
            p_rows_y, p_rows_v, p_pool, p_slot_cells, b_chunk, row_chunks, cell_chunks, rank, scale, i_tile, size,
            num_rows, y_row_stride, v_split_stride, v_row_stride, 4, ADD, SPLITS, BLOCK_RANK, SMALL_RANK, VECTOR_N,
        )  # fmt: skip


@triton.jit
def _expand_item(  # type: ignore[no-untyped-def]
    p_rows_y, p_rows_v, p_pool, p_slot_cells, b_chunk, row_chunks, cell_chunks, rank, scale, i_tile, size, num_rows,
    y_row_stride, v_split_stride, v_row_stride, ROWS: tl.constexpr, ADD: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_RANK: tl.constexpr, SMALL_RANK: tl.constexpr, VECTOR_N: tl.constexpr,
):  # fmt: skip
    """One item for 1, 2 or 4 rows. It waits for one read after another, so it reads as many bytes of
    an adapter of small rank as of any: half the rows, twice as wide, and every other item has nothing to do.
    """
    if SMALL_RANK == 0:  # noqa: SIM114, this is known when the kernel is compiled
        _expand_block(
            p_rows_y, p_rows_v, p_pool, p_slot_cells, b_chunk, row_chunks, cell_chunks, rank, scale,
            i_tile * VECTOR_N, size, num_rows, y_row_stride, v_split_stride, v_row_stride, ROWS, ADD, SPLITS,
            BLOCK_RANK, VECTOR_N,
        )  # fmt: skip
    elif rank > SMALL_RANK:
        _expand_block(
            p_rows_y, p_rows_v, p_pool, p_slot_cells, b_chunk, row_chunks, cell_chunks, rank, scale,
            i_tile * VECTOR_N, size, num_rows, y_row_stride, v_split_stride, v_row_stride, ROWS, ADD, SPLITS,
            BLOCK_RANK, VECTOR_N,
        )  # fmt: skip
    elif i_tile % 2 == 0:
        _expand_block(
            p_rows_y, p_rows_v, p_pool, p_slot_cells, b_chunk, row_chunks, cell_chunks, rank, scale,
            i_tile * VECTOR_N, size, num_rows, y_row_stride, v_split_stride, v_row_stride, ROWS, ADD, SPLITS,
            SMALL_RANK, 2 * VECTOR_N,
        )  # fmt: skip


@triton.jit
def _expand_block(  # type: ignore[no-untyped-def]
    p_rows_y,
    p_rows_v,
    p_pool,
    p_slot_cells,
    b_chunk,
    row_chunks,
    cell_chunks,
    rank,
    scale,
    n,
    size,
    num_rows,
    y_row_stride,
    v_split_stride,
    v_row_stride,
    ROWS: tl.constexpr,  # 1, 2, or 4, of which the last may be missing
    ADD: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Matrix-vector products in float32, every weight straight into registers, once.

    A row's sums are taken in the same order whether it is alone or one of several. With products and sums rounded apart
    (enable_fp_fusion off: the compiler would else fuse other products with sums in each case), its bits are the same.
    """
    o_3 = num_rows - 1  # a fourth row that the segment lacks repeats its last, and is not stored
    o_n = n + tl.arange(0, BLOCK_N)
    m_n = o_n < size
    b_y0 = tl.zeros((BLOCK_N,), p_rows_y.dtype.element_ty)
    if ADD:
        b_y0 = tl.load(p_rows_y + o_n, mask=m_n, other=0.0)
    b_y1, b_y2, b_y3 = b_y0, b_y0, b_y0
    if ADD and ROWS > 1:
        b_y1 = tl.load(p_rows_y + y_row_stride + o_n, mask=m_n, other=0.0)
    if ADD and ROWS > 2:
        b_y2 = tl.load(p_rows_y + 2 * y_row_stride + o_n, mask=m_n, other=0.0)
        b_y3 = tl.load(p_rows_y + o_3 * y_row_stride + o_n, mask=m_n, other=0.0)
    EVICTION: tl.constexpr = "evict_first" if ROWS == 1 else ""  # what a single row reads, hardly another will
    b_d0 = tl.zeros((BLOCK_N,), tl.float32)
    b_d1 = tl.zeros((BLOCK_N,), tl.float32)
    b_d2 = tl.zeros((BLOCK_N,), tl.float32)
    b_d3 = tl.zeros((BLOCK_N,), tl.float32)
    for j in range(0, rank, BLOCK_RANK):
        o_j = j + tl.arange(0, BLOCK_RANK)
        m_j = o_j < rank
        o_b = matrix_offsets(p_slot_cells, b_chunk + n // 64, row_chunks, cell_chunks, o_j, m_j)
        p_b = p_pool + o_b[:, None] + tl.arange(0, BLOCK_N)[None, :]
        b_b = tl.load(p_b, mask=m_j[:, None] & m_n[None, :], other=0.0, eviction_policy=EVICTION).to(tl.float32)
        b_d0 += _weighted_sum(b_b, p_rows_v + o_j, v_split_stride, SPLITS)
        if ROWS > 1:
            b_d1 += _weighted_sum(b_b, p_rows_v + v_row_stride + o_j, v_split_stride, SPLITS)
        if ROWS > 2:
            b_d2 += _weighted_sum(b_b, p_rows_v + 2 * v_row_stride + o_j, v_split_stride, SPLITS)
            b_d3 += _weighted_sum(b_b, p_rows_v + o_3 * v_row_stride + o_j, v_split_stride, SPLITS)
    tl.store(p_rows_y + o_n, (b_y0.to(tl.float32) + scale * b_d0).to(b_y0.dtype), mask=m_n)
    if ROWS > 1:
        p_y1 = p_rows_y + y_row_stride + o_n
        tl.store(p_y1, (b_y1.to(tl.float32) + scale * b_d1).to(b_y0.dtype), mask=m_n)
    if ROWS > 2:
        p_y2 = p_rows_y + 2 * y_row_stride + o_n
        m_3 = m_n & (num_rows > 3)
        tl.store(p_y2, (b_y2.to(tl.float32) + scale * b_d2).to(b_y0.dtype), mask=m_n)
        tl.store(p_y2 + y_row_stride, (b_y3.to(tl.float32) + scale * b_d3).to(b_y0.dtype), mask=m_3)


@triton.jit
def _weighted_sum(b_b, p_v, v_split_stride, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 [columns of b_b]: its rows, weighted by one row's v, whose partials are summed first."""
    b_v = tl.load(p_v)
    for s in tl.static_range(1, SPLITS):
        b_v += tl.load(p_v + s * v_split_stride)
    return tl.sum(b_v[:, None] * b_b, 0)
