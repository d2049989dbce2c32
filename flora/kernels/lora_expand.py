"""Triton: y += scale * v @ B.T for every row's own adapter, in place."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from flora.kernels.modules import CHUNK, MODULES, Group
from flora.kernels.tuning import ExpandTuning, grid_size
from flora.kernels.weights import AdapterWeights
from flora.kernels.work import WorkList


def lora_expand(
    y: Tensor,
    v: Tensor,
    weights: AdapterWeights,
    layer: int,
    group: Group,
    out_starts: Sequence[int],
    out_sizes: Sequence[int],
    work: WorkList,
    tuning: ExpandTuning,
    *,
    num_sms: int,
    overlap: bool,
) -> None:
    """See Ops.lora_expand. In fp16 the shrunk values must lie within fp16's range.

    overlap  may start while the launch before it on the stream ends, which must then be the lora_shrink that made v

    Ground truth: ReferenceOps.lora_expand.  Source: Punica (arXiv:2310.18547), SGMV.
    """
    block_n = min(tuning.block_n, weights.alignment)
    tiles = sum(triton.cdiv(size, block_n) for size in out_sizes)
    items = work.segments.shape[0] * tiles
    if items == 0 or y.shape[0] == 0:
        return
    starts = (*out_starts, *[0] * (3 - len(out_starts)))
    sizes = (*out_sizes, *[0] * (3 - len(out_sizes)))
    _lora_expand_kernel[(grid_size(items, tuning.programs_per_sm, num_sms),)](
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
        layer * len(MODULES) + group.value[0],
        y.stride(0),
        v.stride(0),
        v.stride(1),
        weights.cells.stride(0),
        weights.modules.stride(0),
        weights.scales.stride(0),
        SPLITS=v.shape[0],
        BLOCK_ROWS=max(16, work.block_rows),
        BLOCK_RANK=tuning.block_rank,
        BLOCK_N=block_n,
        OVERLAP=overlap,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        **({"launch_pdl": True} if overlap else {}),
    )


@triton.jit
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
    cells_slot_stride,
    modules_slot_stride,
    scales_slot_stride,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,  # launched before shrink has ended (programmatic dependent launch)
):
    tiles_0 = tl.cdiv(size_0, BLOCK_N)
    tiles_1 = tl.cdiv(size_1, BLOCK_N)
    num_tiles = tiles_0 + tiles_1 + tl.cdiv(size_2, BLOCK_N)
    num_items = tl.load(p_num_segments) * num_tiles
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        i_tile = item % num_tiles
        i_slice = (i_tile >= tiles_0).to(tl.int32) + (i_tile >= tiles_0 + tiles_1).to(tl.int32)
        start = tl.where(i_slice == 0, start_0, tl.where(i_slice == 1, start_1, start_2))
        size = tl.where(i_slice == 0, size_0, tl.where(i_slice == 1, size_1, size_2))
        i_tile -= tl.where(i_slice == 0, 0, tl.where(i_slice == 1, tiles_0, tiles_0 + tiles_1))

        p_segment = p_segments + item // num_tiles * 3
        slot = tl.load(p_segment).to(tl.int64)
        first_row = tl.load(p_segment + 1)
        num_rows = tl.load(p_segment + 2)
        p_record = p_modules + slot * modules_slot_stride + first_module * 3
        column = tl.where(i_slice > 0, tl.load(p_record), 0)
        column += tl.where(i_slice > 1, tl.load(p_record + 3, mask=i_slice > 1, other=0), 0)
        rank = tl.load(p_record + 3 * i_slice)
        b_chunk = tl.load(p_record + 3 * i_slice + 2)
        scale = tl.load(p_scales + slot * scales_slot_stride + first_module + i_slice)

        o_rows = tl.arange(0, BLOCK_ROWS)
        m_rows = o_rows < num_rows
        rows = (first_row + o_rows).to(tl.int64)
        n = i_tile * BLOCK_N
        o_n = tl.arange(0, BLOCK_N)
        m_n = n + o_n < size
        b_delta = tl.zeros((BLOCK_ROWS, BLOCK_N), tl.float32)
        if OVERLAP:
            gdc_wait()
        for j in range(0, rank, BLOCK_RANK):
            o_j = j + tl.arange(0, BLOCK_RANK)
            m_j = o_j < rank
            chunk = b_chunk + o_j * tl.cdiv(size, 64) + n // 64
            cell = tl.load(p_cells + slot * cells_slot_stride + chunk // cell_chunks, mask=m_j, other=0)
            # int64: a bf16 pool over 4 GiB passes 2**31 elements
            o_b = cell.to(tl.int64) * (cell_chunks * 64) + chunk % cell_chunks * 64
            b_b = tl.load(
                p_pool + o_b[:, None] + o_n[None, :], mask=m_j[:, None] & m_n[None, :], other=0.0
            )  # [BLOCK_RANK, BLOCK_N]
            p_partial = p_v + rows[:, None] * v_row_stride + (column + o_j)[None, :]
            b_v = tl.zeros((BLOCK_ROWS, BLOCK_RANK), tl.float32)
            for s in tl.static_range(SPLITS):
                b_v += tl.load(p_partial + s * v_split_stride, mask=m_rows[:, None] & m_j[None, :], other=0.0)
            # v in two terms of the weights' dtype: a tensor core product that keeps twice its digits
            b_high = b_v.to(b_b.dtype)
            b_delta = tl.dot(b_high, b_b, b_delta, input_precision="ieee")
            if b_b.dtype != tl.float32:
                b_low = (b_v - b_high.to(tl.float32)).to(b_b.dtype)
                b_delta = tl.dot(b_low, b_b, b_delta, input_precision="ieee")
        if rank > 0:
            p_out = p_y + rows[:, None] * y_row_stride + (start + n + o_n)[None, :]
            m_out = m_rows[:, None] & m_n[None, :]
            b_y = tl.load(p_out, mask=m_out, other=0.0)
            tl.store(p_out, (b_y.to(tl.float32) + scale * b_delta).to(b_y.dtype), mask=m_out)
