"""What the kernels are timed on: a model's sizes, random adapters over random cells, and a step's graph replayed."""

import dataclasses
import random
import statistics
import time
from collections.abc import Callable

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
    Segment,
    Share,
    WorkList,
    cut_runs,
    padded,
    share_ranks,
)
from flora.serve.engine.batch import PREFILL_BLOCK_ROWS

SEED = 20261121
RANKS = (8, 16, 32, 64)
CELL_BYTES = 64 * 1024
MAX_ERROR = 8e-3  # relative; bf16 keeps 8 bits
Step = Callable[[], object]
QKVO, ALL = (Group.QKV, Group.OUT), tuple(Group)


@dataclasses.dataclass(frozen=True)
class Model:
    hidden: int = 4096
    kv: int = 1024
    ff: int = 14336
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    alignment: int = 2048

    @property
    def inputs(self) -> list[int]:
        return [self.hidden] * 6 + [self.ff]

    @property
    def outputs(self) -> list[int]:
        return [self.hidden, self.kv, self.kv, self.hidden, self.ff, self.ff, self.hidden]

    def outs(self, group: Group) -> tuple[list[int], list[int]]:
        sizes = [self.outputs[m] for m in group.value]
        return [sum(sizes[:s]) for s in range(len(sizes))], sizes

    def place(self, layer: int, group: Group) -> Place:
        return Place(layer, group, *self.outs(group))


LLAMA_8B = Model()
TINY = Model(hidden=256, kv=64, ff=512, q_heads=4, kv_heads=2, head_dim=16, alignment=64)


@dataclasses.dataclass
class Bench:
    """One run: where it runs, what it found."""

    device: torch.device
    model: Model
    rows: list[dict]
    repeats: int
    dtype: torch.dtype = torch.bfloat16

    def record(self, **row: object) -> None:
        self.rows.append(row)
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)

    def check(self, *, error: float, **row: object) -> None:
        """Records an error and ends the run if it is no rounding error."""
        self.record(**row, error=error)
        if not error < MAX_ERROR:
            raise SystemExit(f"error {error:.3g} against float32 is above {MAX_ERROR}: nothing was timed")

    def seconds(self, step: Step) -> float:
        """Median time of one step, as a replayed CUDA graph."""
        step()
        if self.device.type != "cuda":
            return self._wall(step)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for _ in range(3):
            graph.replay()
        times = []
        for _ in range(self.repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            times.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in times) / 1e3

    def _wall(self, step: Step) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start


def build_adapters(bench: Bench, num_adapters: int, layers: int) -> tuple[AdapterWeights, list[int]]:
    """Random adapters of mixed ranks over random cells of one pool, and the rank of each."""
    model, cell_elements = bench.model, CELL_BYTES // 2
    shuffle = random.Random(SEED)
    ranks = [RANKS[i % len(RANKS)] for i in range(num_adapters)]
    shuffle.shuffle(ranks)
    records, cells_of = [], []
    for rank in ranks:
        table, chunk = torch.zeros(layers, len(MODULES), 3, dtype=torch.int32), 0
        for layer in range(layers):
            for part, sizes in ((1, model.inputs), (2, model.outputs)):
                for module, size in enumerate(sizes):
                    table[layer, module, 0], table[layer, module, part] = rank, chunk
                    chunk += rank * padded(size) // CHUNK
        records.append(table)
        cells_of.append(-(-chunk * CHUNK // cell_elements))
    order = torch.randperm(sum(cells_of) * 9 // 8, generator=torch.Generator().manual_seed(SEED)).int()
    cells = torch.full((num_adapters, max(cells_of)), -1, dtype=torch.int32)
    taken = 0
    for slot, count in enumerate(cells_of):
        cells[slot, :count] = order[taken : taken + count]
        taken += count
    pool = torch.empty(len(order), cell_elements, dtype=bench.dtype, device=bench.device)
    for part in pool.split(8192):
        part.normal_(std=0.02)
    scales = torch.full((num_adapters, layers, len(MODULES)), 2.0)
    cells, modules, scales = (t.to(bench.device) for t in (cells, torch.stack(records), scales))
    return AdapterWeights(pool, cells, modules, scales, alignment=model.alignment), ranks


def decode_work(bench: Bench, slots: list[int], rows_each: int, ranks: list[int]) -> LoraWork:
    """Of rows that decode, as an engine cuts them."""
    runs = [(slot, i * rows_each, rows_each) for i, slot in enumerate(slots)]
    return cut_work(bench, runs, ranks)


def cut_work(bench: Bench, runs: list[Segment], ranks: list[int], room: int | None = None) -> LoraWork:
    """Runs as an engine cuts them. room: for so many segments, which grids hang on."""
    segments = cut_runs(runs, SEGMENT_ROWS, ranks)
    shares, lanes = share_ranks(segments, ranks), room and room * RANK_LANES
    return LoraWork(
        listed(bench, shares, SEGMENT_ROWS, ranks, capacity=lanes, shared=True),
        listed(bench, segments, SEGMENT_ROWS, ranks, capacity=room),
    )


def prompt_work(bench: Bench, slot: int, rows: int, ranks: list[int]) -> LoraWork:
    """Of a prompt in a step of many rows."""
    work = listed(bench, cut_runs([(slot, 0, rows)], PREFILL_BLOCK_ROWS, ranks), PREFILL_BLOCK_ROWS, ranks)
    return LoraWork(work, work)


def listed(
    bench: Bench,
    segments: list[Segment] | list[Share],
    block_rows: int,
    ranks: list[int],
    *,
    capacity: int | None = None,
    shared: bool = False,
) -> WorkList:
    return WorkList.build(
        segments, block_rows=block_rows, max_rank=max(ranks), capacity=capacity, shared=shared, device=bench.device
    )


def relative(value: Tensor, wanted: Tensor) -> float:
    return float((value - wanted).norm() / wanted.norm())
