"""Adapter weights as the kernels see them: one pool of cells and three tables that say where each factor lies."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flora.kernels.modules import CHUNK


@dataclass(frozen=True, slots=True, eq=False)
class AdapterWeights:
    """Typed views of the unified pool and the tables of its resident adapters, all on one device.

    An adapter is one stream of elements over its cells in order: element e lies in cell
    `cells[slot, e // cell_elements]` at `e % cell_elements`. A is stored [rank, in_features] and B transposed,
    [rank, out_features], both row-major with every row padded to whole chunks of 64 elements. Padding is never read:
    it may hold NaN.
    """

    # [num_cells, cell_elements] fp32, fp16, bf16 or float8_e4m3fn, contiguous; cell_elements is a multiple of 64
    pool: Tensor
    cells: Tensor  # int32 [num_slots, max_cells]; unread past an adapter's last cell
    modules: Tensor  # int32 [num_slots, num_layers, 7, 3]: rank (0 = absent), start of A and of B in chunks
    scales: Tensor  # float32 [num_slots, num_layers, 7]: alpha / rank, less the powers of two that fp8 factors carry
    # Elements: a power of two that divides cell_elements and every matrix's start. A kernel looks a cell up once per
    # row_alignment of it, so 64, which always holds, is slow on a GPU: see matrix_alignment.
    alignment: int = CHUNK

    def product_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which factors are multiplied with numbers of `dtype`: its own, where it holds every factor exactly."""
        return dtype if self.are_fp8 or self.pool.dtype == dtype else torch.float32

    @property
    def are_fp8(self) -> bool:
        return self.pool.dtype == torch.float8_e4m3fn

    def gather(self, cells: Tensor) -> Tensor:
        """[len(cells), cell_elements]: copies of these cells of the pool, in its dtype."""
        if not self.are_fp8:
            return self.pool.index_select(0, cells)
        return self.pool.view(torch.uint8).index_select(0, cells).view(torch.float8_e4m3fn)  # torch selects no fp8
