"""Triton: x @ A.T for every row's own adapter, split over the input so that few adapters still fill the GPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from flora.kernels.modules import CHUNK, MODULES, Place, padded, row_alignment
from flora.kernels.tuning import LoraTuning, grid_size
from flora.kernels.weights import AdapterWeights
from flora.kernels.work import RANK_BLOCK, RANK_LANES, SEGMENT_ROWS, WorkList


def lora_shrink(
    x: Tensor,
    weights: AdapterWeights,
    place: Place,
    work: WorkList,
    tuning: LoraTuning,
    *,
    num_sms: int,
    overlap: bool,
) -> Tensor:
    """float32 partials [splits, n, num_slices, width] of x[i] @ A_s.T; splits depends on in_features alone.

    work     of whole segments, each of whose programs walks over its ranks, or of Shares, which many programs do
    overlap  let the launch that follows, lora_expand, start while this one ends
    returns  values up to each rank's next multiple of block_rank; what lies past that is never written.
    Ground truth: ReferenceOps.lora_shrink.  Source: Punica (arXiv:2310.18547), SGMV.
    """
    if work.is_shared and tuning.block_rank != RANK_BLOCK:
        raise ValueError(f"a list of shares needs block_rank {RANK_BLOCK}, not {tuning.block_rank}: or whole segments")
    n, in_features = x.shape
    modules = place.group.value
    num_slices = len(modules)
    split = tuning.split_of(in_features)
    splits = triton.cdiv(in_features, split)
    width = triton.cdiv(work.max_rank, tuning.block_rank) * tuning.block_rank
    v = torch.empty(splits, n, num_slices, width, dtype=torch.float32, device=x.device)
    span = min(row_alignment(weights.alignment, in_features), split)
    dtype = weights.product_dtype(x.dtype)
    is_half = dtype.itemsize == 2  # a float32 product's tiles need twice the registers
    items = work.segments.shape[0] * num_slices * splits
    if items == 0 or n == 0:
        return v
    _lora_shrink_kernel[(grid_size(items, tuning.programs_per_sm, num_sms),)](
        x,
        weights.pool,
        weights.cells,
        weights.modules,
        work.segments,
        work.num_segments,
        v,
        in_features,
        padded(in_features) // CHUNK,
        weights.pool.shape[1] // CHUNK,
        (place.layer * len(MODULES) + modules[0]) * 3,
        x.stride(0),
        weights.cells.stride(0),
        weights.modules.stride(0),
        *v.stride()[:3],
        NUM_SLICES=num_slices,
        SPLITS=splits,
        SPLIT=split,
        SPAN=span,
        BLOCK_K=min(tuning.shrink_block_k, span),
        BLOCK_ROWS=max(SEGMENT_ROWS, triton.next_power_of_2(work.block_rows)),
        BLOCK_RANK=tuning.block_rank,
        LANES=RANK_LANES if work.is_shared else 1,
        DTYPE=triton_dtype(dtype),
        OVERLAP=overlap,
        num_warps=tuning.shrink_warps,
        num_stages=tuning.shrink_stages,
        maxnreg=tuning.shrink_registers if is_half else None,
    )
    return v


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of one of torch's floating dtypes."""
    return getattr(tl, str(dtype).removeprefix("torch."))


@triton.jit(do_not_specialize=["record_offset"])  # a layer's number: it would be compiled anew for multiples of 16
def _lora_shrink_kernel(  # type: ignore[no-untyped-def]
    p_x,
    p_pool,
    p_cells,
    p_modules,
    p_segments,
    p_num_segments,
    p_v,
    in_features,
    row_chunks,
    cell_chunks,
    record_offset,
    x_row_stride,
    cells_slot_stride,
    modules_slot_stride,
    v_split_stride,
    v_row_stride,
    v_slice_stride,
    NUM_SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,  # input elements that one partial sums
    SPAN: tl.constexpr,  # elements of a stored row that lie in one cell wherever they start
    BLOCK_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    LANES: tl.constexpr,  # the list's Shares of one segment; 1: it is of whole segments
    DTYPE: tl.constexpr,  # of the product
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()  # expand may start now; it waits for these results where it first needs them
    i_first = tl.program_id(0)
    # The first item's segment is read while the number of segments still travels: an item waits for one load less.
    slot, first_row, num_rows, lane = _load_share(p_segments, i_first // (SPLITS * NUM_SLICES), LANES)
    num_items = tl.load(p_num_segments) * (NUM_SLICES * SPLITS)
    for item in range(i_first, num_items, tl.num_programs(0)):
        if item != i_first:
            slot, first_row, num_rows, lane = _load_share(p_segments, item // (SPLITS * NUM_SLICES), LANES)
        i_split = item % SPLITS
        i_slice = item // SPLITS % NUM_SLICES
        p_record = p_modules + slot * modules_slot_stride + record_offset + 3 * i_slice
        rank = tl.load(p_record)
        a_chunk = tl.load(p_record + 1)
        p_slot_cells = p_cells + slot * cells_slot_stride
        p_rows_x = p_x + first_row * x_row_stride
        p_rows_v = p_v + i_split * v_split_stride + first_row * v_row_stride + i_slice * v_slice_stride
        k_begin = i_split * SPLIT
        k_end = tl.minimum(in_features, k_begin + SPLIT)
        o_rows = tl.arange(0, BLOCK_ROWS).to(tl.int64)
        m_rows = (o_rows < num_rows)[:, None]
        for j in range(lane * BLOCK_RANK, rank, LANES * BLOCK_RANK):
            b_v = _shrink_rows(
                p_rows_x + o_rows[:, None] * x_row_stride, m_rows, p_pool, p_slot_cells, a_chunk, row_chunks,
                cell_chunks, j, rank, k_begin, k_end, SPAN, BLOCK_ROWS, BLOCK_RANK, BLOCK_K, DTYPE,
            )  # fmt: skip
            o_j = j + tl.arange(0, BLOCK_RANK)
            tl.store(p_rows_v + o_rows[None, :] * v_row_stride + o_j[:, None], b_v, mask=(o_rows < num_rows)[None, :])


@triton.jit
def _shrink_rows(  # type: ignore[no-untyped-def]
    p_rows_x,
    m_rows,
    p_pool,
    p_slot_cells,
    a_chunk,
    row_chunks,
    cell_chunks,
    j,
    rank,
    k_begin,
    k_end,
    SPAN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """float32 [BLOCK_RANK, BLOCK_ROWS] of rows that share the adapter. On tensor cores also where there is one row: its
    bits are then the same alone and beside others, and the weights' way from memory is the same length. Rows are the
    product's columns, of which a tensor core takes eight at a time, where its own rows are sixteen.
    """
    o_j = j + tl.arange(0, BLOCK_RANK)
    m_j = o_j < rank
    b_v = tl.zeros((BLOCK_RANK, BLOCK_ROWS), tl.float32)
    for k in range(k_begin, k_end, SPAN):
        o_a = matrix_offsets(p_slot_cells, a_chunk + k // 64, row_chunks, cell_chunks, o_j, m_j)
        for k_block in range(0, SPAN, BLOCK_K):
            o_k = k_block + tl.arange(0, BLOCK_K)
            m_k = k + o_k < k_end
            b_a = tl.load(p_pool + o_a[:, None] + o_k[None, :], mask=m_j[:, None] & m_k[None, :], other=0.0)
            b_x = tl.load(p_rows_x + (k + o_k)[None, :], mask=m_rows & m_k[None, :], other=0.0)
            b_v = tl.dot(as_factor(b_a, DTYPE), tl.trans(b_x.to(DTYPE)), b_v, input_precision="ieee")
    return b_v


@triton.jit
def as_factor(b_factor, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of a factor as the product takes it. From fp8 by way of float32: there is no quick one to bf16."""
    if b_factor.dtype == DTYPE:
        return b_factor
    else:
        return b_factor.to(tl.float32).to(DTYPE)


@triton.jit
def matrix_offsets(p_slot_cells, first_chunk, row_chunks, cell_chunks, o_j, m_j):  # type: ignore[no-untyped-def]
    """int64 [rows]: where the matrix's rows o_j lie in the pool, from the column that `first_chunk` stands for."""
    chunk = first_chunk + o_j * row_chunks
    cell = tl.load(p_slot_cells + chunk // cell_chunks, mask=m_j, other=0)
    # int64: a bf16 pool over 4 GiB passes 2**31 elements
    return cell.to(tl.int64) * (cell_chunks * 64) + chunk % cell_chunks * 64


@triton.jit
def _load_share(p_segments, i_share, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """(slot, first row, number of rows, lane)."""
    if LANES == 1:
        slot, first_row, num_rows = load_segment(p_segments, i_share)
        return slot, first_row, num_rows, 0
    p_share = p_segments + i_share * 4
    slot, first_row = tl.load(p_share).to(tl.int64), tl.load(p_share + 1).to(tl.int64)
    return slot, first_row, tl.load(p_share + 2), tl.load(p_share + 3)


@triton.jit
def load_segment(p_segments, i_segment):  # type: ignore[no-untyped-def]
    """(slot, first row, number of rows)."""
    p_segment = p_segments + i_segment * 3
    slot, first_row = tl.load(p_segment).to(tl.int64), tl.load(p_segment + 1).to(tl.int64)
    return slot, first_row, tl.load(p_segment + 2)
