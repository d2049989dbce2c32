"""Random adapters laid out in a pool full of NaN, and the float64 arithmetic that they should give."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.kernels import (
    CHUNK,
    MODULES,
    RANK_LANES,
    SEGMENT_ROWS,
    AdapterWeights,
    Group,
    LoraWork,
    Place,
    WorkList,
    padded,
    share_ranks,
    split_segments,
)

NAN = float("nan")


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """Input and output sizes of the seven modules, in MODULES order."""

    hidden: int
    kv: int
    ff: int

    @property
    def inputs(self) -> tuple[int, ...]:
        return (self.hidden,) * 6 + (self.ff,)

    @property
    def outputs(self) -> tuple[int, ...]:
        return (self.hidden, self.kv, self.kv, self.hidden, self.ff, self.ff, self.hidden)

    def out_starts(self, group: Group) -> list[int]:
        sizes = self.out_sizes(group)
        return [sum(sizes[:s]) for s in range(len(sizes))]

    def out_sizes(self, group: Group) -> list[int]:
        return [self.outputs[m] for m in group.value]

    def place(self, layer: int, group: Group) -> Place:
        return Place(layer, group, self.out_starts(group), self.out_sizes(group))


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A[m] [rank, in], B[m] [out, rank] and scale[m] of one layer's modules; rank 0 is an absent module."""

    a: list[Tensor]
    b: list[Tensor]
    scale: list[float]

    @property
    def ranks(self) -> list[int]:
        return [len(a) for a in self.a]


def random_adapter(shape: Shape, ranks: list[int], seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    a = [torch.randn(r, n, generator=generator) / n**0.5 for r, n in zip(ranks, shape.inputs, strict=True)]
    b = [torch.randn(n, r, generator=generator) for r, n in zip(ranks, shape.outputs, strict=True)]
    return Adapter(a, b, [0.5 + 0.25 * m for m in range(len(MODULES))])


def pack_adapters(
    layers_of: list[list[Adapter]],
    *,
    cell_elements: int = 256,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    alignment: int = CHUNK,
) -> AdapterWeights:
    """The adapters (each a list of layers) scattered over random cells of a pool in which all else is NaN.

    alignment  elements that every matrix starts on
    """
    streams, records = [], []
    for layers in layers_of:
        rows: list[Tensor] = []
        table = torch.zeros(len(layers), len(MODULES), 3, dtype=torch.int32)
        chunk = 0
        for i, layer in enumerate(layers):
            for part, matrices in ((1, layer.a), (2, [b.t() for b in layer.b])):
                for m, matrix in enumerate(matrices):
                    gap = -chunk % (alignment // CHUNK)
                    rows.append(torch.full((gap * CHUNK,), NAN))
                    chunk += gap
                    table[i, m, 0], table[i, m, part] = len(matrix), chunk
                    row = torch.full((len(matrix), padded(matrix.shape[1])), NAN)
                    row[:, : matrix.shape[1]] = matrix
                    rows.append(row.flatten())
                    chunk += row.numel() // CHUNK
        streams.append(torch.cat(rows))
        records.append(table)
    counts = [-(-len(stream) // cell_elements) for stream in streams]
    pool = torch.full((2 * sum(counts) + 3, cell_elements), NAN)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).int()
    cells = torch.full((len(streams), max(counts)), -1, dtype=torch.int32)
    taken = 0
    for slot, (stream, count) in enumerate(zip(streams, counts, strict=True)):
        cells[slot, :count] = order[taken : taken + count]
        filled = torch.full((count * cell_elements,), NAN)
        filled[: len(stream)] = stream
        pool[cells[slot, :count].long()] = filled.view(count, cell_elements)
        taken += count
    scales = torch.tensor([[layer.scale for layer in layers] for layers in layers_of])
    return AdapterWeights(pool.to(dtype), cells, torch.stack(records), scales, alignment)


def work_for(
    row_slots: list[int | None],
    *,
    block_rows: int = SEGMENT_ROWS,
    max_rank: int = 64,
    spare: int = 3,
    device: torch.device | str = "cpu",
) -> WorkList:
    segments = split_segments(row_slots, block_rows)
    capacity = len(segments) + spare
    work = WorkList.build(segments, block_rows=block_rows, max_rank=max_rank, capacity=capacity, device=device)
    work.segments[len(segments) :] = 10**6  # what lies past num_segments must never be read
    return work


def cut_work(
    row_slots: list[int | None],
    ranks: Sequence[int],
    *,
    max_rank: int = 64,
    spare: int = 3,
    device: torch.device | str = "cpu",
) -> LoraWork:
    """A list for each kernel, as the runner has them. ranks: the highest of each slot's adapter."""
    segments = split_segments(row_slots, SEGMENT_ROWS)
    shares, room = share_ranks(segments, ranks), RANK_LANES * (len(segments) + spare)
    shrink = WorkList.build(
        shares, block_rows=SEGMENT_ROWS, max_rank=max_rank, capacity=room, shared=True, device=device
    )
    shrink.segments[len(shares) :] = 10**6
    return LoraWork(shrink, work_for(row_slots, max_rank=max_rank, spare=spare, device=device))


def expected_lora(x: Tensor, y: Tensor, adapters: list[Adapter | None], shape: Shape, group: Group) -> Tensor:
    """float64 y + scale * x A^T B^T, row by row; `adapters` names each row's adapter."""
    out = y.double()
    for i, adapter in enumerate(adapters):
        if adapter is None:
            continue
        for module, start, size in zip(group.value, shape.out_starts(group), shape.out_sizes(group), strict=True):
            shrunk = x[i].double() @ adapter.a[module].double().t()
            out[i, start : start + size] += adapter.scale[module] * (shrunk @ adapter.b[module].double().t())
    return out
