"""LoRA's two products on a CPU: tiles of eight rows, those of alike adapters in one batched product.

The reference makes one product for each adapter and module. Most of that is calls, so adapters of the same ranks are
gathered and multiplied together here. A tile has eight rows whether one or eight are in use, and is multiplied by its
own adapter's factors alone: what a row gets does not depend on the step around it, wherever the machine's batched
product gives equal tiles equal bits. `fewest_tiles` asks the machine, shape by shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from flora.kernels import CHUNK, AdapterWeights, Place, WorkList, linear, padded

TILE = 8  # rows

Record = tuple[int, int, int]  # rank, first chunk of A, first chunk of B


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """Rows of adapters that are laid out alike: T tiles, of one adapter each or all of one adapter."""

    slots: Tensor  # int64 [T], or [1]
    rows: Tensor  # int64 [T * TILE]: of the step; a tile's first row again where it has no more
    used: Tensor | slice  # int64 [k]: which of them are rows in use
    targets: Tensor | slice  # int64 [k]: rows[used]
    records: list[list[Record]]  # [num_layers][7]


def plan_tiles(work: WorkList, weights: AdapterWeights) -> list[Tiles]:
    """The step's segments as tiles; adapters of the same ranks and places, with one tile each, are put together."""
    tables = weights.modules.numpy()
    alike: dict[bytes, list[tuple[int, int, int]]] = {}
    alone: list[tuple[int, int, int]] = []
    for slot, first, count in work.segments[: int(work.num_segments)].tolist():
        if count <= TILE:
            alike.setdefault(tables[slot].tobytes(), []).append((slot, first, count))
        else:
            alone.append((slot, first, count))
    return [_tiles(segments, weights) for segments in (*alike.values(), *([segment] for segment in alone))]


def _tiles(segments: list[tuple[int, int, int]], weights: AdapterWeights) -> Tiles:
    tiles = [
        range(row, min(row + TILE, first + count))
        for _, first, count in segments
        for row in range(first, first + count, TILE)
    ]
    return Tiles(
        slots=torch.tensor([slot for slot, _, _ in segments]),
        rows=torch.tensor([rows[i] if i < len(rows) else rows[0] for rows in tiles for i in range(TILE)]),
        used=_as_slice([t * TILE + i for t, rows in enumerate(tiles) for i in range(len(rows))]),
        targets=_as_slice([row for rows in tiles for row in rows]),
        records=weights.modules[segments[0][0]].tolist(),
    )


def _as_slice(indices: list[int]) -> Tensor | slice:
    """A slice where the indices are evenly spaced: it selects without a copy."""
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    if indices == list(range(indices[0], indices[-1] + 1, step)):
        return slice(indices[0], indices[-1] + 1, step)
    return torch.tensor(indices)


def shrink(x: Tensor, v: Tensor, tiles: Tiles, weights: AdapterWeights, place: Place) -> None:
    """v[i, c_s + j] = x[i] @ A_s[j] for the rows of the tiles and each slice s of the place's group.

    x  [n, in_features];  v  float32 [n, width]
    """
    features = x.shape[1]
    records = [tiles.records[place.layer][module] for module in place.group.value]
    gathered: Tensor | None = None
    column = 0
    for chunk, rank in _runs(records, padded(features) // CHUNK):
        if gathered is None:
            gathered = x[tiles.rows].float().view(-1, TILE, features)
        factors = _factors(weights, tiles.slots, chunk, rank, features)
        result = tile_product(gathered, factors, transposed=True)
        v[:, column : column + rank][tiles.targets] = result.view(-1, rank)[tiles.used]
        column += rank


def expand(y: Tensor, v: Tensor, tiles: Tiles, weights: AdapterWeights, place: Place) -> None:
    """y[i, out_starts[s] : + out_sizes[s]] += scale_s * sum_j v[i, c_s + j] * B_s[:, j] for the rows of the tiles."""
    column = 0
    gathered = v[tiles.rows]
    for module, start, size in zip(place.group.value, place.out_starts, place.out_sizes, strict=True):
        rank, _, chunk = tiles.records[place.layer][module]
        if rank == 0:
            continue
        scales = weights.scales[tiles.slots, place.layer, module]
        shrunk = gathered[:, column : column + rank].view(-1, TILE, rank) * scales[:, None, None]
        factors = _factors(weights, tiles.slots, chunk, rank, size)
        delta = tile_product(shrunk, factors, transposed=False).view(-1, size)[tiles.used]
        part = y[:, start : start + size]
        part[tiles.targets] = (part[tiles.targets].float() + delta).to(y.dtype)
        column += rank


def tile_product(tiles: Tensor, factors: Tensor, *, transposed: bool) -> Tensor:
    """tiles[t] @ factors[t], or its transpose; factors of one adapter serve all tiles. float32 [T, TILE, columns]

    tiles  [T, TILE, inner];  factors  [T or 1, rank, features]
    """
    factors = factors.transpose(1, 2) if transposed else factors
    factors = factors.expand(len(tiles), -1, -1)
    least = fewest_tiles(factors.shape[1], factors.shape[2], transposed, torch.get_num_threads())
    if least is None:
        return torch.stack([linear(tile, factor.t()) for tile, factor in zip(tiles, factors, strict=True)])
    if len(tiles) >= least:
        return torch.bmm(tiles, factors)
    return torch.stack(
        [
            torch.bmm(tile.expand(least, -1, -1), factor.expand(least, -1, -1))[0]
            for tile, factor in zip(tiles, factors, strict=True)
        ]
    )


def _runs(records: Sequence[Record], chunks_per_row: int) -> list[tuple[int, int]]:
    """(first chunk, rank) of the group's A factors; those that lie back to back count as one."""
    runs: list[tuple[int, int]] = []
    for rank, chunk, _ in records:
        if runs and runs[-1][0] + runs[-1][1] * chunks_per_row == chunk:
            runs[-1] = (runs[-1][0], runs[-1][1] + rank)
        elif rank:
            runs.append((chunk, rank))
    return runs


def _factors(weights: AdapterWeights, slots: Tensor, chunk: int, rank: int, features: int) -> Tensor:
    """float32 [len(slots), rank, features], gathered from the adapters' streams at `chunk`."""
    cell_elements = weights.pool.shape[1]
    start, length = chunk * CHUNK, rank * padded(features)
    first_cell, end_cell = start // cell_elements, -(-(start + length) // cell_elements)
    cells = weights.cells[slots, first_cell:end_cell].flatten()
    streams = weights.gather(cells).view(len(slots), -1)
    offset = start - first_cell * cell_elements
    return streams[:, offset : offset + length].view(len(slots), rank, -1)[:, :, :features].float()


@cache
def fewest_tiles(inner: int, columns: int, transposed: bool, num_threads: int) -> int | None:
    """The smallest batch from which on a row of [T, TILE, inner] @ [T, inner, columns] has the same bits in any tile.

    None if there is none. With fewer tiles than threads, MKL was seen to share one tile among them in another order.
    num_threads  torch's now: another number may take another way
    """
    return next((least for least in (1, 2, 4, 8, 16) if keeps_rows(inner, columns, transposed, least)), None)


def keeps_rows(inner: int, columns: int, transposed: bool, least: int) -> bool:
    """Whether one row has the same bits at every place, in batches of `least` tiles and more, beside NaN."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(inner, generator=generator)
    shape = (columns, inner) if transposed else (inner, columns)
    wanted = torch.randn(*shape, generator=generator)
    seen: Tensor | None = None
    for num_tiles, shared in (
        (1, True),
        (2, True),
        (2, False),
        (3, False),
        (5, False),
        (9, True),
        (18, False),
        (64, True),
    ):
        if num_tiles < least:
            continue
        tiles = torch.randn(num_tiles, TILE, inner, generator=generator)
        tiles[0, 1] = float("nan")
        padding = 3  # rows of factors lie padded
        factors = torch.randn(1 if shared else num_tiles, shape[0], shape[1] + padding, generator=generator)
        place = num_tiles // 2
        factors[0 if shared else place, :, : shape[1]] = wanted
        tiles[place, [0, 3, 7]] = row
        operand = factors[:, :, : shape[1]]
        operand = (operand.transpose(1, 2) if transposed else operand).expand(num_tiles, -1, -1)
        for bits in torch.bmm(tiles, operand)[place, [0, 3, 7]].view(torch.int32):
            seen = bits if seen is None else seen
            if not torch.equal(bits, seen):
                return False
    return True
