"""Triton: x @ A.T for every row's own adapter, split over the input so that few adapters still fill the GPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from flora.kernels.modules import CHUNK, MODULES, Group, padded
from flora.kernels.tuning import ShrinkTuning, grid_size
from flora.kernels.weights import AdapterWeights
from flora.kernels.work import WorkList


def lora_shrink(
    x: Tensor,
    weights: AdapterWeights,
    layer: int,
    group: Group,
    work: WorkList,
    tuning: ShrinkTuning,
    *,
    num_sms: int,
    overlap: bool,
) -> Tensor:
    """float32 partials [splits, n, width] of Ops.lora_shrink; splits depends on in_features alone.

    Ground truth: ReferenceOps.lora_shrink.  Source: Punica (arXiv:2310.18547), SGMV.
    """
    n, in_features = x.shape
    splits = triton.cdiv(in_features, tuning.split_elements)
    v = torch.empty(splits, n, work.max_rank * len(group.value), dtype=torch.float32, device=x.device)
    span = min(weights.alignment, tuning.split_elements)
    items = work.segments.shape[0] * len(group.value) * tuning.rank_lanes * splits
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
        (layer * len(MODULES) + group.value[0]) * 3,
        x.stride(0),
        weights.cells.stride(0),
        weights.modules.stride(0),
        v.stride(0),
        v.stride(1),
        NUM_SLICES=len(group.value),
        SPLITS=splits,
        SPLIT=tuning.split_elements,
        SPAN=span,
        BLOCK_K=min(tuning.block_k, span),
        BLOCK_ROWS=max(16, work.block_rows),
        BLOCK_RANK=tuning.block_rank,
        RANK_LANES=tuning.rank_lanes,
        SAME_DTYPE=x.dtype == weights.pool.dtype,
        OVERLAP=overlap,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
    )
    return v


@triton.jit
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
    NUM_SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,  # input elements that one partial sums
    SPAN: tl.constexpr,  # elements of a stored row that lie in one cell wherever they start
    BLOCK_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    RANK_LANES: tl.constexpr,  # programs that share one (segment, slice, split), by rank block
    SAME_DTYPE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()  # expand may start now; it waits for these results where it first needs them
    num_items = tl.load(p_num_segments) * (NUM_SLICES * RANK_LANES * SPLITS)
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        i_split = item % SPLITS
        i_lane = item // SPLITS % RANK_LANES
        i_slice = item // (SPLITS * RANK_LANES) % NUM_SLICES
        p_segment = p_segments + item // (SPLITS * RANK_LANES * NUM_SLICES) * 3
        slot = tl.load(p_segment).to(tl.int64)
        first_row = tl.load(p_segment + 1)
        num_rows = tl.load(p_segment + 2)

        p_record = p_modules + slot * modules_slot_stride + record_offset
        column = 0  # of this slice in v: the ranks of the slices before it
        for s in tl.static_range(NUM_SLICES):
            column += tl.where(s < i_slice, tl.load(p_record + 3 * s), 0)
        rank = tl.load(p_record + 3 * i_slice)
        a_chunk = tl.load(p_record + 3 * i_slice + 1)

        o_rows = tl.arange(0, BLOCK_ROWS)
        m_rows = o_rows < num_rows
        rows = (first_row + o_rows).to(tl.int64)
        o_k = tl.arange(0, BLOCK_K)
        for j in range(i_lane * BLOCK_RANK, rank, RANK_LANES * BLOCK_RANK):
            o_j = j + tl.arange(0, BLOCK_RANK)
            m_j = o_j < rank
            b_v = tl.zeros((BLOCK_ROWS, BLOCK_RANK), tl.float32)
            k_end = tl.minimum(in_features, (i_split + 1) * SPLIT)
            for k_span in range(i_split * SPLIT, k_end, SPAN):
                chunk = a_chunk + o_j * row_chunks + k_span // 64
                cell = tl.load(p_cells + slot * cells_slot_stride + chunk // cell_chunks, mask=m_j, other=0)
                # int64: a bf16 pool over 4 GiB passes 2**31 elements
                o_a = cell.to(tl.int64) * (cell_chunks * 64) + chunk % cell_chunks * 64
                for k_block in range(0, SPAN, BLOCK_K):
                    k = k_span + k_block + o_k
                    m_k = k < k_end
                    b_a = tl.load(
                        p_pool + o_a[:, None] + (k_block + o_k)[None, :],
                        mask=m_j[:, None] & m_k[None, :],
                        other=0.0,
                    )  # [BLOCK_RANK, BLOCK_K]
                    b_x = tl.load(
                        p_x + rows[:, None] * x_row_stride + k[None, :], mask=m_rows[:, None] & m_k[None, :], other=0.0
                    )  # [BLOCK_ROWS, BLOCK_K]
                    if not SAME_DTYPE:
                        b_a, b_x = b_a.to(tl.float32), b_x.to(tl.float32)
                    b_v = tl.dot(b_x, tl.trans(b_a), b_v, input_precision="ieee")
            tl.store(
                p_v + i_split * v_split_stride + rows[:, None] * v_row_stride + (column + o_j)[None, :],
                b_v,
                mask=m_rows[:, None] & m_j[None, :],
            )
