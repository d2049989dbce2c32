"""An adapter in the device's own layout: one contiguous host buffer, copied to its pages as it is."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.adapter import Adapter
from flora.errors import NotFinite
from flora.kernels import CHUNK, padded
from flora.serve.engine.layout import AdapterLayout, AdapterTable, PlacedModule


@dataclass(frozen=True, slots=True, eq=False)
class PackedAdapter:
    """What a load brings: everything that residency needs, under a serving digest."""

    digest: str
    table: AdapterTable
    cells: Tensor  # [num_cells, cell_elements] in the pool's dtype; padding is never read
    num_pages: int
    load_s: float
    release: Callable[[], None] | None = None  # gives the cells' memory back, where it is the arena's

    @property
    def num_bytes(self) -> int:
        return self.cells.numel() * self.cells.element_size()


def pack_cells(adapter: Adapter, layout: AdapterLayout, cells: Tensor) -> None:
    """Fills `cells`, [num_cells, cell_elements], with the adapter's stream. What pads rows and cells stays as it was.

    Raises NotFinite for NaN, infinity, or overflow of the cells' dtype.
    """
    stream = cells.view(-1)
    for placed in layout.modules:
        factors = adapter.factors[placed.name]
        _write(stream, placed.a_chunk, factors.A, placed)
        _write(stream, placed.b_chunk, factors.B.T, placed)


def _write(stream: Tensor, chunk: int, rows: Tensor, placed: PlacedModule) -> None:
    """Copies [rank, features] to the stream at `chunk`, each row padded to whole chunks."""
    rank, features = rows.shape
    start = chunk * CHUNK
    place = stream[start : start + rank * padded(features)].view(rank, padded(features))[:, :features]
    place.copy_(rows)
    if rank and not all(map(math.isfinite, torch.stack(place.aminmax()).tolist())):  # they carry NaN; isfinite is slow
        raise NotFinite(
            f"{placed.name} has NaN or infinite factors as {str(stream.dtype).removeprefix('torch.')}",
            cause="training diverged, the file is damaged, or a value is too large for the pool's dtype",
            fix="serve an earlier version, or a pool of bfloat16 or float32",
            tensor=placed.name,
        )
