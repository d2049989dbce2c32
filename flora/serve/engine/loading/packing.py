"""An adapter in the device's own layout: one contiguous host buffer, copied to its pages as it is."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flora.adapter import Adapter
from flora.errors import NotFinite
from flora.kernels import CHUNK, padded
from flora.lowrank import LowRank
from flora.serve.engine.layout import AdapterLayout, AdapterTable, PlacedModule
from flora.serve.engine.loading.narrowing import FP8, narrow

_Bits = NDArray[np.signedinteger[Any]]
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # by itemsize
_BLOCK_BYTES = 32 << 10  # of the 48 KiB of a first-level cache; 16 and 64 KiB take 1.05 and 1.3 times as long
_MIN_ROWS = 64  # of a block of a very large rank, in the second-level cache then: a row of the place gets whole lines


@dataclass(frozen=True, slots=True, eq=False)
class PackedAdapter:
    """What a load brings: everything that residency needs, under a serving digest."""

    digest: str
    table: AdapterTable
    cells: Tensor  # [num_cells, adapter_cell_elements] in the pool's dtype of adapters; padding is never read
    num_pages: int
    load_s: float
    release: Callable[[], None] | None = None  # gives the cells' memory back, where it is the arena's

    @property
    def num_bytes(self) -> int:
        return self.cells.numel() * self.cells.element_size()


def pack_cells(adapter: Adapter, layout: AdapterLayout, cells: Tensor) -> AdapterTable:
    """Fills `cells`, [num_cells, elements], with the adapter's stream, and says what kernels must know to read it.

    What pads rows and cells stays as it was. Raises NotFinite for NaN, infinity, or overflow of the cells' dtype; none
    overflows fp8.
    """
    if cells.dtype == FP8:
        return layout.table(_pack_narrow(adapter.factors, layout, cells))
    stream = _bits(cells, cells.dtype).reshape(-1)
    infinity = _infinity(cells.dtype)
    for placed in layout.modules:
        factors = adapter.factors[placed.name]
        A, B = _bits(factors.A, cells.dtype), _bits(factors.B, cells.dtype)
        if not _are_finite(A, infinity):
            raise _not_finite(placed, cells.dtype)
        _rows(stream, placed.a_chunk, *A.shape)[:] = A
        if not _are_finite(B, infinity):  # right before it is copied: the check brings it into the cache
            raise _not_finite(placed, cells.dtype)
        _transpose(B, _rows(stream, placed.b_chunk, *B.T.shape))
    return layout.table()


def _pack_narrow(factors: Mapping[str, LowRank], layout: AdapterLayout, cells: Tensor) -> dict[str, int]:
    """The same in fp8: of each module, which power of two its factors' product was multiplied by."""
    stream = _bits(cells, FP8).reshape(-1)
    exponents = {}
    for placed in layout.modules:
        given = factors[placed.name]
        a, b = narrow(given.A), narrow(given.B)
        if a is None or b is None:
            raise _not_finite(placed, given.A.dtype, can_overflow=False)
        A, B = _bits(a[0], FP8), _bits(b[0], FP8)
        _rows(stream, placed.a_chunk, *A.shape)[:] = A
        _transpose(B, _rows(stream, placed.b_chunk, *B.T.shape))
        exponents[placed.name] = a[1] + b[1]
    return exponents


def _bits(numbers: Tensor, dtype: torch.dtype) -> _Bits:
    """The numbers in that dtype, as signed integers of the same bits: numpy copies these at several times the speed."""
    array: _Bits = numbers.to(dtype).view(_INTEGERS[dtype.itemsize]).numpy()
    return array


def _infinity(dtype: torch.dtype) -> int:
    """Its bits; those of minus infinity, read without their sign bit, are the same."""
    return int(_bits(torch.tensor([math.inf]), dtype)[0])


def _are_finite(bits: _Bits, infinity: int) -> bool:
    """Whether all exponents have a zero bit: a number is finite if its magnitude's bits are less than infinity's.

    The largest of the integers is the positive number of most magnitude; read without sign, the negative one.
    """
    if not bits.size:
        return True
    unsigned = bits.view(f"u{bits.itemsize}")
    sign = 1 << 8 * bits.itemsize - 1
    return bool(bits.max() < infinity and unsigned.max() < sign + infinity)


def _not_finite(placed: PlacedModule, dtype: torch.dtype, *, can_overflow: bool = True) -> NotFinite:
    """can_overflow  numbers were rounded to `dtype`, and are not stored in it"""
    what = f"{placed.name} has NaN or infinite factors as {str(dtype).removeprefix('torch.')}"
    if not can_overflow:
        return NotFinite(
            what, cause="training diverged, or the file is damaged", fix="serve an earlier version", tensor=placed.name
        )
    return NotFinite(
        what,
        cause="training diverged, the file is damaged, or a value is too large for the pool's dtype",
        fix="serve an earlier version, or a pool of bfloat16 or float32",
        tensor=placed.name,
    )


def _rows(stream: _Bits, chunk: int, rank: int, features: int) -> _Bits:
    """The place in the stream of [rank, features], each row of which starts on a chunk."""
    start, width = chunk * CHUNK, padded(features)
    return stream[start : start + rank * width].reshape(rank, width)[:, :features]


def _transpose(B: _Bits, place: _Bits) -> None:
    """Writes B [out, rank] to [rank, out], by blocks of B that stay in a core's first cache."""
    out, rank = B.shape
    num_rows = max(_BLOCK_BYTES // max(rank * B.itemsize, 1), _MIN_ROWS)
    for start in range(0, out, num_rows):
        place[:, start : start + num_rows] = B[start : start + num_rows].T
