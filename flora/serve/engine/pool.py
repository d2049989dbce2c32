"""The device's one allocation, and its typed views: KV planes and adapter cells."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flora.errors import UsageError
from flora.serve.engine.layout import PoolGeometry

_NAN_BYTE = 0xFF  # repeated, it is a NaN in float32, float16, bfloat16 and float8_e4m3fn


class DevicePool:
    """All KV and every resident adapter's weights: the only copy that the forward pass reads."""

    def __init__(
        self, geometry: PoolGeometry, dtype: torch.dtype, device: torch.device, adapter_dtype: torch.dtype | None = None
    ) -> None:
        """adapter_dtype  of adapters' weights; None: as keys and values. Of the geometry's itemsizes, both

        Raises UsageError where the device has less memory left.
        """
        self.geometry = geometry
        self.storage = _allocate(geometry.num_pages * geometry.page_bytes, device)
        self.storage.fill_(_NAN_BYTE)
        self.cells: Tensor = self.storage.view(dtype).view(geometry.num_cells, geometry.cell_elements)
        self.adapter_cells: Tensor = self.storage.view(adapter_dtype or dtype).view(
            geometry.num_cells, geometry.adapter_cell_elements
        )
        self._planes = self.cells.view(geometry.num_planes, geometry.num_pages, geometry.cell_elements)
        kv_shape = (geometry.num_pages, 2, geometry.page_tokens, geometry.num_kv_heads, geometry.head_dim)
        self._kv = [plane[:, : geometry.kv_elements].view(kv_shape) for plane in self._planes]

    def kv(self, layer: int) -> Tensor:
        """[num_pages, 2, page_tokens, num_kv_heads, head_dim]; 0 is K, 1 is V."""
        return self._kv[layer]

    def write_adapter(self, pages: Sequence[int], packed: Tensor) -> NDArray[np.int64]:
        """Copies a packed adapter, [num_cells, adapter_cell_elements], into its pages; their cell ids."""
        cells = self.geometry.cell_ids(pages, len(packed))
        packed = as_words(packed).to(self.cells.device)
        as_words(self.adapter_cells).index_copy_(0, torch.from_numpy(cells).to(self.cells.device), packed)
        return cells

    def poison(self, pages: Sequence[int]) -> None:
        """Fills pages with NaN: whoever still reads them shows it."""
        if pages:
            as_words(self._planes)[:, torch.tensor(pages, device=self.cells.device)] = -1  # see _NAN_BYTE


def as_words(cells: Tensor) -> Tensor:
    """Cells as int64: torch moves no fp8, and large words quicker than small ones."""
    return cells.view(torch.int64)


def _allocate(num_bytes: int, device: torch.device) -> Tensor:
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    except RuntimeError as error:  # torch.OutOfMemoryError is one; a CPU's allocator has no name for it
        what = f"a pool of {num_bytes / 2**30:.1f} GiB does not fit in the memory of {device}"
        if device.type != "cuda":
            raise UsageError(what, fix="give it less: --pool SIZE") from error
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(device))
        raise UsageError(
            what,
            cause=f"{free:.1f} of {total:.1f} GiB are free, once the base's weights lie there",
            fix="give it less (--pool SIZE), or end what else runs on this GPU: nvidia-smi names it",
        ) from error
