"""Triton: y += scale * v @ B.T for every row's own adapter, in place."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from flora.kernels.expand_pairs import expand_whole_rank_in_pairs
from flora.kernels.expand_rows import expand_rows
from flora.kernels.expand_shared import expand_by_rank, expand_whole_rank
from flora.kernels.lora_shrink import load_segment, triton_dtype
from flora.kernels.modules import CHUNK, MODULES, Place, row_alignment
from flora.kernels.tuning import LoraTuning, grid_size, overlapped
from flora.kernels.weights import AdapterWeights
from flora.kernels.work import SEGMENT_ROWS, WorkList


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
    overlap  may start while the launch before it on the stream, which wrote v, ends. y is then read before that end:
             whoever wrote y must have ended when that launch began, as shrink's, an ordinary one, sees to
    add      False: = instead of +=, and 0 where a row's adapter leaves out the module
    Ground truth: ReferenceOps.lora_expand.  Source: Punica (arXiv:2310.18547), SGMV.
    """
    most_n = min(row_alignment(weights.alignment, size) for size in place.out_sizes)
    width = min(tuning.expand_width, most_n)
    narrow = min(tuning.expand_narrow, width)
    capacity = work.segments.shape[0]
    items, few_items = (capacity * sum(triton.cdiv(size, each) for size in place.out_sizes) for each in (width, narrow))
    if items == 0 or y.shape[0] == 0:
        return
    crowd = tuning.expand_crowd * num_sms
    absent = [0] * (3 - len(place.out_sizes))
    starts, sizes = (*place.out_starts, *absent), (*place.out_sizes, *absent)
    is_half = y.dtype.itemsize == 2
    come_in_pairs = is_half and not any(length % 2 for length in (y.stride(0), *starts, *sizes))
    most_items = max(items, min(few_items, crowd * (width // narrow)))
    many = work.block_rows > SEGMENT_ROWS  # a persistent grid; where segments have few rows one program has one item
    _lora_expand_kernel[(grid_size(items, tuning.programs_per_sm, num_sms) if many else most_items,)](
        y,
        v,
        weights.pool,
        weights.cells,
        weights.modules,
        weights.scales,
        work.segments,
        work.num_segments,
        *starts,
        *sizes,
        weights.pool.shape[1] // CHUNK,
        place.layer * len(MODULES) + place.group.value[0],
        y.stride(0),
        *v.stride()[:3],
        weights.cells.stride(0),
        weights.modules.stride(0),
        weights.scales.stride(0),
        capacity,
        crowd,
        SPLITS=v.shape[0],
        MANY=many,
        ADD=add,
        DTYPE=triton_dtype(weights.product_dtype(y.dtype)),
        PAIRS=come_in_pairs and weights.are_fp8,
        WIDTH=width,
        NARROW=narrow,
        SMALL_N=min(tuning.expand_small_n, narrow),
        MIDDLE_N=min(tuning.expand_middle_n, narrow),
        LARGE_N=min(tuning.expand_large_n, narrow),
        STAGES=tuning.expand_stages,
        BLOCK_ROWS=max(SEGMENT_ROWS, triton.next_power_of_2(work.block_rows)),
        BLOCK_RANK=tuning.block_rank,
        num_warps=tuning.expand_warps,
        num_stages=tuning.expand_stages,
        maxnreg=tuning.expand_registers if is_half else None,
        **overlapped(overlap),
    )


@triton.jit(do_not_specialize=["first_module", "capacity", "crowd"])  # as in shrink: one kernel for every layer
def _lora_expand_kernel(  # type: ignore[no-untyped-def]
    p_y,
    p_v,
    p_pool,
    p_cells,
    p_modules,
    p_scales,
    p_segments,
    p_num_segments,
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
    capacity,
    crowd,
    SPLITS: tl.constexpr,
    MANY: tl.constexpr,  # segments may have more rows than a product of few
    ADD: tl.constexpr,  # to what y holds
    DTYPE: tl.constexpr,  # of the product
    PAIRS: tl.constexpr,  # factors in fp8: two outputs are read, and written, as one
    WIDTH: tl.constexpr,  # outputs per item
    NARROW: tl.constexpr,  # where there would be less than `crowd` items
    SMALL_N: tl.constexpr,  # outputs per product: of ranks up to 16
    MIDDLE_N: tl.constexpr,  # up to 32
    LARGE_N: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    OVERLAP: tl.constexpr,  # launched before shrink has ended (programmatic dependent launch)
):
    tl.static_assert(NARROW % 64 == 0, "an item begins with a chunk")
    i_first = tl.program_id(0)
    wide_tiles = tl.cdiv(size_0, WIDTH) + tl.cdiv(size_1, WIDTH) + tl.cdiv(size_2, WIDTH)
    narrow_tiles = tl.cdiv(size_0, NARROW) + tl.cdiv(size_1, NARROW) + tl.cdiv(size_2, NARROW)
    slot, first_row, num_rows = load_segment(p_segments, tl.minimum(i_first // wide_tiles, capacity - 1))
    i_narrow = tl.minimum(i_first // narrow_tiles, capacity - 1)
    slot_narrow, first_row_narrow, num_rows_narrow = load_segment(p_segments, i_narrow)
    num_segments = tl.load(p_num_segments)
    is_narrow = num_segments * wide_tiles < crowd
    slot = tl.where(is_narrow, slot_narrow, slot)
    first_row = tl.where(is_narrow, first_row_narrow, first_row)
    num_rows = tl.where(is_narrow, num_rows_narrow, num_rows)
    width = tl.where(is_narrow, NARROW, WIDTH)
    num_tiles = tl.where(is_narrow, narrow_tiles, wide_tiles)
    num_items = num_segments * num_tiles
    if MANY:
        for item in range(i_first, num_items, tl.num_programs(0)):
            if item != i_first:
                slot, first_row, num_rows = load_segment(p_segments, item // num_tiles)
            i_slice, start, size, n = _outputs_of(
                item % num_tiles, width, start_0, start_1, start_2, size_0, size_1, size_2
            )
            rank, b_chunk, scale = _module_of(
                p_modules, p_scales, slot, first_module + i_slice, modules_slot_stride, scales_slot_stride
            )
            if OVERLAP:
                gdc_wait()
            if (rank > 0) | (not ADD):
                expand_rows(
                    p_y + first_row * y_row_stride + start, p_v + first_row * v_row_stride + i_slice * v_slice_stride,
                    p_pool, p_cells + slot * cells_slot_stride, b_chunk, tl.cdiv(size, 64), cell_chunks, rank, scale,
                    n, size, num_rows, y_row_stride, v_split_stride, v_row_stride, ADD, DTYPE,
                    SPLITS, BLOCK_ROWS, BLOCK_RANK, WIDTH, LARGE_N,
                )  # fmt: skip
    elif i_first < num_items:  # a loop's registers would be spilled
        i_slice, start, size, n = _outputs_of(
            i_first % num_tiles, width, start_0, start_1, start_2, size_0, size_1, size_2
        )
        rank, b_chunk, scale = _module_of(
            p_modules, p_scales, slot, first_module + i_slice, modules_slot_stride, scales_slot_stride
        )
        p_slot_cells = p_cells + slot * cells_slot_stride
        n_chunk, row_chunks = b_chunk + n // 64, tl.cdiv(size, 64)
        p_rows_v = p_v + first_row * v_row_stride + i_slice * v_slice_stride
        p_rows_y = p_y + first_row * y_row_stride + start + n
        if (rank > 0) | (not ADD):
            if rank <= 16:
                _expand_few(
                    p_rows_y, p_rows_v, p_pool, p_slot_cells, n_chunk, row_chunks, cell_chunks, rank, scale,
                    tl.minimum(width, size - n), num_rows, y_row_stride, v_split_stride, v_row_stride, ADD, DTYPE,
                    SPLITS, BLOCK_ROWS, 16, SMALL_N, STAGES, OVERLAP, PAIRS,
                )  # fmt: skip
            elif rank <= 32:
                _expand_few(
                    p_rows_y, p_rows_v, p_pool, p_slot_cells, n_chunk, row_chunks, cell_chunks, rank, scale,
                    tl.minimum(width, size - n), num_rows, y_row_stride, v_split_stride, v_row_stride, ADD, DTYPE,
                    SPLITS, BLOCK_ROWS, 32, MIDDLE_N, STAGES, OVERLAP, PAIRS,
                )  # fmt: skip
            elif rank <= 64:
                _expand_few(
                    p_rows_y, p_rows_v, p_pool, p_slot_cells, n_chunk, row_chunks, cell_chunks, rank, scale,
                    tl.minimum(width, size - n), num_rows, y_row_stride, v_split_stride, v_row_stride, ADD, DTYPE,
                    SPLITS, BLOCK_ROWS, 64, LARGE_N, STAGES, OVERLAP, PAIRS,
                )  # fmt: skip
            else:
                expand_by_rank(
                    p_rows_y, p_rows_v, p_pool, p_slot_cells, n_chunk, row_chunks, cell_chunks, rank, scale,
                    tl.minimum(width, size - n), num_rows, y_row_stride, v_split_stride, v_row_stride, ADD, DTYPE,
                    SPLITS, BLOCK_ROWS, 64, LARGE_N, STAGES, OVERLAP,
                )  # fmt: skip


@triton.jit
def _expand_few(  # type: ignore[no-untyped-def]
    p_y, p_v, p_pool, p_slot_cells, n_chunk, row_chunks, cell_chunks, rank, scale, width, num_rows, y_row_stride,
    v_split_stride, v_row_stride, ADD: tl.constexpr, DTYPE: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
    RANK: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    if PAIRS:
        expand_whole_rank_in_pairs(
            p_y, p_v, p_pool, p_slot_cells, n_chunk, row_chunks, cell_chunks, rank, scale, width, num_rows,
            y_row_stride, v_split_stride, v_row_stride, ADD, DTYPE, SPLITS, ROWS, RANK, BLOCK_N, STAGES, OVERLAP,
        )  # fmt: skip
    else:
        expand_whole_rank(
            p_y, p_v, p_pool, p_slot_cells, n_chunk, row_chunks, cell_chunks, rank, scale, width, num_rows,
            y_row_stride, v_split_stride, v_row_stride, ADD, DTYPE, SPLITS, ROWS, RANK, BLOCK_N, STAGES, OVERLAP,
        )  # fmt: skip


@triton.jit
def _outputs_of(tile, width, start_0, start_1, start_2, size_0, size_1, size_2):  # type: ignore[no-untyped-def]
    """(slice, where it starts in y, its size, the first of its outputs) of the group's tile of so many outputs."""
    tiles_0, tiles_1 = tl.cdiv(size_0, width), tl.cdiv(size_1, width)
    i_slice = (tile >= tiles_0).to(tl.int32) + (tile >= tiles_0 + tiles_1).to(tl.int32)
    start = tl.where(i_slice == 0, start_0, tl.where(i_slice == 1, start_1, start_2))
    size = tl.where(i_slice == 0, size_0, tl.where(i_slice == 1, size_1, size_2))
    tile -= tl.where(i_slice == 0, 0, tl.where(i_slice == 1, tiles_0, tiles_0 + tiles_1))
    return i_slice, start, size, tile * width


@triton.jit
def _module_of(p_modules, p_scales, slot, module, modules_slot_stride, scales_slot_stride):  # type: ignore[no-untyped-def]
    """(rank, first chunk of B, scale) of a slot's adapter; scale 0 where it leaves out the module."""
    p_record = p_modules + slot * modules_slot_stride + module * 3
    rank = tl.load(p_record)
    scale = tl.load(p_scales + slot * scales_slot_stride + module)
    return rank, tl.load(p_record + 2), tl.where(rank > 0, scale, 0.0)
