"""How close do the Triton kernels come to the rate at which this GPU reads memory?

    python benchmarks/bench_kernels.py [--out FILE.jsonl] [--sweep [--shard 0/8]]

Decoding is bound by bytes: every step reads each running adapter once and each sequence's keys and values once. So the
figure of merit is bytes that must be read (true ranks, true lengths) over the time of a CUDA-graph replay. Errors
against float32 arithmetic on the same numbers come before any timing, and a wrong result ends the run. Baselines beside
ours: a plain copy, adapters padded to one rank under torch.bmm, torch's attention over contiguous keys and values.
"""

import argparse
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from peer_kernels import NoPeer, PeerLora, expected, slotted_module
from peer_sglang import SglangLora
from peer_vllm import VllmLora
from torch import Tensor

from flora.kernels import (
    CHUNK,
    FEW_ROWS,
    MODULES,
    AdapterWeights,
    Context,
    Group,
    Ops,
    Place,
    ReferenceOps,
    WorkList,
    heaviest_first,
    padded,
)
from flora.kernels.triton_ops import TritonOps

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
    alignment: int = 1024

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


def work_list(bench: Bench, slots: list[int], block_rows: int, rows_each: int, ranks: list[int]) -> WorkList:
    segments = [
        (slot, i * rows_each + first, min(block_rows, rows_each - first))
        for i, slot in enumerate(slots)
        for first in range(0, rows_each, block_rows)
    ]
    segments = heaviest_first(segments, ranks)
    return WorkList.build(segments, block_rows=block_rows, max_rank=max(ranks), device=bench.device)


Inputs = dict[Group, tuple[Tensor, Tensor]]  # x and y


def lora_inputs(bench: Bench, n: int, groups: tuple[Group, ...]) -> Inputs:
    def randn(columns: int) -> Tensor:
        return torch.randn(n, columns, device=bench.device).to(bench.dtype)

    return {g: (randn(bench.model.inputs[g.value[0]]), randn(sum(bench.model.outs(g)[1]))) for g in groups}


def shrink_step(bench: Bench, ops: Ops, weights: AdapterWeights, group: Group, work: WorkList, x: Tensor) -> Step:
    def step() -> None:
        for layer in range(weights.modules.shape[1]):
            ops.lora_shrink(x, weights, bench.model.place(layer, group), work)

    return step


def expand_step(
    bench: Bench, ops: Ops, weights: AdapterWeights, group: Group, work: WorkList, x: Tensor, y: Tensor
) -> Step:
    places = [bench.model.place(layer, group) for layer in range(weights.modules.shape[1])]
    shrunk = [ops.lora_shrink(x, weights, place, work) for place in places]

    def step() -> None:
        for place, v in zip(places, shrunk, strict=True):
            ops.lora_expand(y, v, weights, place, work)

    return step


def lora_step(
    bench: Bench, ops: Ops, weights: AdapterWeights, groups: tuple[Group, ...], work: WorkList, data: Inputs
) -> Step:
    def step() -> None:
        for layer in range(weights.modules.shape[1]):
            for group in groups:
                x, y = data[group]
                place = bench.model.place(layer, group)
                ops.lora_expand(y, ops.lora_shrink(x, weights, place, work), weights, place, work)

    return step


def check_lora(bench: Bench, ops: Ops, weights: AdapterWeights, ranks: list[int], rows_each: int = 1) -> None:
    """Relative error of one layer's update against float32, and the same for torch's own rounding of it to bf16."""
    slots = list(range(0, len(ranks), max(1, len(ranks) // 16)))
    work = work_list(bench, slots, FEW_ROWS, rows_each, ranks)
    for group, (x, y) in lora_inputs(bench, len(slots) * rows_each, ALL).items():
        result, wanted = y.clone(), y.float()
        place = bench.model.place(0, group)
        ops.lora_expand(result, ops.lora_shrink(x, weights, place, work), weights, place, work)
        v = ReferenceOps().lora_shrink(x.float(), weights, place, work)
        ReferenceOps().lora_expand(wanted, v, weights, place, work)
        bench.check(
            check="lora",
            group=group.name,
            rows_each=rows_each,
            error=relative(result.float(), wanted),
            rounding=relative(wanted.to(bench.dtype).float(), wanted),
        )


def relative(value: Tensor, wanted: Tensor) -> float:
    return float((value - wanted).norm() / wanted.norm())


def lora_bytes(model: Model, ranks: list[int], groups: tuple[Group, ...], layers: int) -> tuple[int, int]:
    """Bytes of A and of B that one pass over all adapters must read."""
    modules = [m for g in groups for m in g.value]
    total = sum(ranks) * layers * 2
    return total * sum(model.inputs[m] for m in modules), total * sum(model.outputs[m] for m in modules)


def bench_lora(bench: Bench, ops: TritonOps, weights: AdapterWeights, ranks: list[int]) -> None:
    layers, n = weights.modules.shape[1], len(ranks)
    work = work_list(bench, list(range(n)), FEW_ROWS, 1, ranks)
    data = lora_inputs(bench, n, ALL)
    for name, groups in (("q,k,v,o", QKVO), ("all seven", ALL)):
        read = sum(lora_bytes(bench.model, ranks, groups, layers))
        for overlap in {ops.overlap, False}:
            chosen = TritonOps(ops.num_sms, ops.tuning, overlap=overlap)
            seconds = bench.seconds(lora_step(bench, chosen, weights, groups, work, data))
            us, rate = seconds / layers * 1e6, read / seconds / 1e12
            bench.record(op="lora", modules=name, adapters=n, overlap=overlap, us_per_layer=us, tb_s=rate)
    for group in ALL:
        x, y = data[group]
        steps = (
            ("shrink", shrink_step(bench, ops, weights, group, work, x)),
            ("expand", expand_step(bench, ops, weights, group, work, x, y)),
        )
        for (name, step), read in zip(steps, lora_bytes(bench.model, ranks, (group,), layers), strict=True):
            seconds = bench.seconds(step)
            bench.record(op=name, group=group.name, adapters=n, us=seconds / layers * 1e6, tb_s=read / seconds / 1e12)
    padded_baseline(bench, n, max(ranks))


def bench_peer(bench: Bench, name: str, make: Callable[[list[int]], PeerLora], ranks: list[int], layers: int) -> None:
    """Another engine's kernels, distinct adapters as in bench_lora; a row says why where there are none.

    name  of the engine's rows;  make  its kernels, for rows that want these slots
    """
    n, model, slots = len(ranks), bench.model, list(range(len(ranks)))
    try:
        peer = make(slots)
    except NoPeer as error:
        bench.record(op=name, skipped=str(error)[:200])
        return
    data = lora_inputs(bench, n, ALL)
    for modules, groups in (("q,k,v,o", QKVO), ("all seven", ALL)):
        layers_of_packed = []
        for layer in range(layers):
            packed_of = {}
            for group in groups:
                x, y = data[group]
                module = slotted_module(ranks, x.shape[1], model.outs(group)[1], bench.dtype, bench.device)
                packed_of[group] = peer.packed(module, n)
                if layer == 0:
                    result = y.clone()
                    peer.add(result, x, packed_of[group])
                    error = relative(result.float(), expected(y, x, module, slots))
                    bench.check(check=name, group=group.name, error=error)
            layers_of_packed.append(packed_of)

        def step(layers_of_packed: list = layers_of_packed) -> None:
            for packed_of in layers_of_packed:
                for group, packed in packed_of.items():
                    x, y = data[group]
                    peer.add(y, x, packed)

        seconds, read = bench.seconds(step), sum(lora_bytes(model, ranks, groups, layers))
        bench.record(
            op=name, modules=modules, adapters=n, version=peer.version, us_per_layer=seconds / layers * 1e6,
            tb_s=read / seconds / 1e12,
        )  # fmt: skip


def padded_baseline(bench: Bench, n: int, rank: int) -> None:
    """q, k, v, o with every adapter padded to the highest rank in its own slot: torch.bmm, at its best layout."""
    model = bench.model
    modules = [m for g in QKVO for m in g.value]
    factors = [
        (
            torch.randn(n, model.inputs[m], rank, device=bench.device).to(bench.dtype),
            torch.randn(n, rank, model.outputs[m], device=bench.device).to(bench.dtype),
        )
        for m in modules
    ]
    x = torch.randn(n, 1, model.hidden, device=bench.device).to(bench.dtype)
    ys = [torch.zeros(n, 1, model.outputs[m], device=bench.device).to(bench.dtype) for m in modules]

    def step() -> None:
        for y, (a, b) in zip(ys, factors, strict=True):
            y.baddbmm_(torch.bmm(x, a), b)

    seconds = bench.seconds(step)
    read = sum(a.numel() + b.numel() for a, b in factors) * 2
    bench.record(
        op="padded torch.bmm", modules="q,k,v,o", adapters=n, us_per_layer=seconds * 1e6, tb_s=read / seconds / 1e12
    )


def lora_cases(bench: Bench, ranks: list[int]) -> Iterator[tuple[str, WorkList, int]]:
    """(name, work list, rows): decode over all adapters, over few, over none; and prefill of one adapter."""
    n, hot = len(ranks), [ranks.index(rank) for rank in RANKS]
    yield "distinct", work_list(bench, list(range(n)), FEW_ROWS, 1, ranks), n
    yield "four adapters", work_list(bench, hot, FEW_ROWS, n // 4, ranks), n
    yield "one of rank 64", work_list(bench, hot[-1:], FEW_ROWS, n, ranks), n
    yield "none", WorkList.build([], block_rows=FEW_ROWS, max_rank=max(ranks), capacity=n, device=bench.device), n
    yield "prefill 2048, rank 64", work_list(bench, hot[-1:], 64, 2048, ranks), 2048
    yield "prefill 2048, rank 16", work_list(bench, hot[1:2], 64, 2048, ranks), 2048


def bench_cases(bench: Bench, ops: Ops, weights: AdapterWeights, ranks: list[int]) -> None:
    for name, work, rows in lora_cases(bench, ranks):
        seconds = bench.seconds(lora_step(bench, ops, weights, ALL, work, lora_inputs(bench, rows, ALL)))
        us = seconds / weights.modules.shape[1] * 1e6
        bench.record(op="lora", case=name, modules="all seven", rows=rows, us_per_layer=us)


def caches(bench: Bench, batch: int, context: int, page_tokens: int = 16) -> tuple[list[Tensor], Tensor]:
    """Two planes of random keys and values on shuffled pages, and the block tables."""
    pages = batch * context // page_tokens
    shape = (pages, 2, page_tokens, bench.model.kv_heads, bench.model.head_dim)
    planes = [torch.randn(shape, device=bench.device, dtype=bench.dtype) for _ in range(2)]
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(SEED)).int().view(batch, -1)
    return planes, order.to(bench.device)


def attention_step(bench: Bench, ops: Ops, batch: int, context: int, queries: int) -> tuple[Step, float | None]:
    """Attention of `batch` sequences over two planes in turn; and, for a small batch, its error against float32."""
    planes, tables = caches(bench, batch, context)
    model = bench.model
    q = torch.randn(batch * queries, model.q_heads, model.head_dim, device=bench.device, dtype=bench.dtype)
    lens = torch.full((batch,), context, dtype=torch.int32, device=bench.device)
    starts = (torch.arange(batch + 1) * queries).int().to(bench.device)
    scale = model.head_dim**-0.5
    most = 1 if queries == 1 else None

    def attend(ops: Ops, q: Tensor, plane: Tensor) -> Tensor:
        return ops.paged_attention(q, plane, Context(tables, lens, starts, max_queries=most), scale)

    def step() -> None:
        for plane in planes:
            attend(ops, q, plane)

    if batch > 4:
        return step, None
    return step, relative(attend(ops, q, planes[0]).float(), attend(ReferenceOps(), q.float(), planes[0]))


def check_attention(bench: Bench, ops: Ops) -> None:
    for kind, context, queries in (("decode", 496, 1), ("decode", 2000, 1), ("prefill", 704, 300)):
        _, error = attention_step(bench, ops, 4, context, queries)
        assert error is not None
        bench.check(check="attention", kind=kind, context=context, queries=queries, error=error)


def bench_attention(bench: Bench, ops: Ops) -> None:
    model = bench.model
    for batch in (128, 256):
        for context in (512, 2048):
            step, _ = attention_step(bench, ops, batch, context, 1)
            seconds = bench.seconds(step) / 2
            read = batch * context * model.kv_heads * model.head_dim * 2 * 2
            bench.record(
                op="decode attention", batch=batch, context=context, us=seconds * 1e6, tb_s=read / seconds / 1e12
            )
    for batch, context, queries in ((1, 2048, 2048), (4, 2048, 512)):
        step, _ = attention_step(bench, ops, batch, context, queries)
        seconds = bench.seconds(step) / 2
        pairs = batch * queries * (context - (queries - 1) / 2)
        flops = 4 * pairs * model.q_heads * model.head_dim
        bench.record(
            op="prefill attention",
            batch=batch,
            context=context,
            queries=queries,
            us=seconds * 1e6,
            tflop_s=flops / seconds / 1e12,
        )
    contiguous_baseline(bench, 128, 512)


def contiguous_baseline(bench: Bench, batch: int, context: int) -> None:
    """torch's attention over keys and values that lie contiguous, which a paged server's do not."""
    model = bench.model
    q = torch.randn(batch, model.q_heads, 1, model.head_dim, device=bench.device, dtype=bench.dtype)
    kv = [
        torch.randn(2, batch, model.kv_heads, context, model.head_dim, device=bench.device).to(bench.dtype)
        for _ in range(2)
    ]

    def step() -> None:
        for k, v in kv:
            F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    seconds = bench.seconds(step) / 2
    read = kv[0].numel() * 2
    bench.record(
        op="torch sdpa, contiguous", batch=batch, context=context, us=seconds * 1e6, tb_s=read / seconds / 1e12
    )


def copy_rate(bench: Bench) -> None:
    source = torch.randn(2**28 if bench.device.type == "cuda" else 2**16, device=bench.device)
    target = torch.empty_like(source)
    seconds = bench.seconds(lambda: target.copy_(source))
    bench.record(op="copy", tb_s=2 * source.numel() * 4 / seconds / 1e12)


def variants() -> Iterator[tuple[str, dict[str, int | None]]]:
    """The tilings that are tried around the defaults of flora/kernels/tuning.py, which are the winners so far."""
    for part in ("lora", "wide_lora", "decode", "prefill"):
        yield part, {}
    yield "lora", {"shrink_warps": 1, "shrink_block_k": 64}
    yield "lora", {"shrink_warps": 1}
    yield "lora", {"shrink_warps": 4}
    yield "lora", {"shrink_block_k": 256}
    yield "lora", {"shrink_stages": 3}
    yield "lora", {"shrink_stages": 6}
    yield "lora", {"split_elements": 2048}
    yield "lora", {"shrink_lanes": 2}
    yield "lora", {"expand_registers": None}
    yield "lora", {"expand_registers": 96}
    yield "lora", {"expand_vector_n": 256, "expand_registers": None}
    for programs in (16, 64):
        yield "lora", {"programs_per_sm": programs}
    yield "wide_lora", {"programs_per_sm": 16}
    yield "wide_lora", {"programs_per_sm": 32}
    yield "wide_lora", {"split_elements": 4096}
    yield "wide_lora", {"shrink_warps": 4, "shrink_block_k": 64}
    yield "wide_lora", {"expand_vector_n": 256, "expand_matrix_n": 256}
    yield "wide_lora", {"expand_warps": 8, "expand_vector_n": 256, "expand_matrix_n": 256}
    yield "decode", {"split_tokens": 1024}
    yield "decode", {"split_tokens": 256}
    yield "prefill", {"block_tokens": 128}


def sweep(
    bench: Bench,
    ops: TritonOps,
    weights: AdapterWeights,
    ranks: list[int],
    parts: Sequence[str],
    shard: tuple[int, int],
) -> TritonOps:
    """Times every tiling on top of what has helped so far, and returns the best.

    shard  (i, n): only each n-th tiling from the i-th on, so that n processes can compile them all in parallel first.
    """
    best: dict[str, float] = {}
    chosen_variants = [(part, sizes) for part, sizes in variants() if part in parts]
    for part, sizes in chosen_variants[shard[0] :: shard[1]]:
        tiling = dataclasses.replace(getattr(ops.tuning, part), **sizes)
        chosen = TritonOps(ops.num_sms, dataclasses.replace(ops.tuning, **{part: tiling}), overlap=ops.overlap)
        try:
            if part in ("lora", "wide_lora"):
                found = time_lora(bench, chosen, weights, ranks, wide=part == "wide_lora")
            else:
                found = time_attention(bench, chosen, part)
        except (RuntimeError, triton.runtime.errors.TritonError) as error:  # a tiling that does not fit the device
            bench.record(sweep=part, tiling=str(sizes), failed=type(error).__name__)
            continue
        score = sum(WEIGHTS.get(name, 1.0) * us for name, us in found.items())
        kept = score < best.get(part, float("inf"))
        bench.record(sweep=part, tiling=str(sizes), kept=kept, score=score, **found)
        if kept:
            best[part], ops = score, chosen
    return ops


# What a microsecond counts in the choice of a tiling: most of all the batch of many adapters, least the empty one.
WEIGHTS = {
    "distinct qkvo": 1.0,
    "distinct all": 0.5,
    "four adapters qkvo": 0.1,
    "four adapters all": 0.1,
    "one of rank 64 qkvo": 0.05,
    "one of rank 64 all": 0.1,
    "none qkvo": 0.2,
    "none all": 0.2,
}


def time_lora(bench: Bench, ops: Ops, weights: AdapterWeights, ranks: list[int], *, wide: bool) -> dict[str, float]:
    layers, n, found = weights.modules.shape[1], len(ranks), {}
    for name, work, rows in lora_cases(bench, ranks):
        if (rows > n) == wide:
            for modules, groups in (("qkvo", QKVO), ("all", ALL)):
                step = lora_step(bench, ops, weights, groups, work, lora_inputs(bench, rows, groups))
                found[f"{name} {modules}"] = bench.seconds(step) / layers * 1e6
    return found


def time_attention(bench: Bench, ops: Ops, part: str) -> dict[str, float]:
    found = {}
    for batch, context, queries in (
        ((128, 512, 1), (128, 2048, 1)) if part == "decode" else ((1, 2048, 2048), (4, 2048, 512))
    ):
        step, _ = attention_step(bench, ops, batch, context, queries)
        found[f"{batch}x{context}"] = bench.seconds(step) / 2 * 1e6
    return found


def headline(bench: Bench, ops: TritonOps) -> dict[str, float | None]:
    """What is claimed: shrink and expand of q, k, v, o, and of all seven; decode attention where it is slowest."""
    lora = {
        str(row["modules"]): row["tb_s"]
        for row in bench.rows
        if row.get("op") == "lora" and row.get("overlap") == ops.overlap and "tb_s" in row
    }
    decode = [row["tb_s"] for row in bench.rows if row.get("op") == "decode attention"]
    return {
        "lora_tb_s": lora.get("q,k,v,o"),
        "lora_all_tb_s": lora.get("all seven"),
        "decode_tb_s": min(decode, default=None),
    }


def environment(bench: Bench, ops: TritonOps) -> dict[str, object]:
    command = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu"
    return {
        "bench": "kernels",
        "label": "kernels",
        "device": name,
        "gpu": name if bench.device.type == "cuda" else None,
        **headline(bench, ops),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": os.environ.get("FLORA_COMMIT") or commit or "unknown",
        "seed": SEED,
        "kernels": ops.name,
        "tuning": dataclasses.asdict(ops.tuning),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append one JSON line to this file")
    parser.add_argument(
        "--sweep", action="store_true", help="first time every tiling of `variants`, then run with the best"
    )
    parser.add_argument("--parts", default="lora,wide_lora,decode,prefill", help="with --sweep: only these tilings")
    parser.add_argument("--shard", default="0/1", help="with --sweep: only each N-th tiling from the I-th on, as I/N")
    parser.add_argument("--adapters", type=int, default=128)
    parser.add_argument("--vllm", type=Path, metavar="FOLDER", help="where vLLM is installed: its kernels beside ours")
    parser.add_argument("--sglang", type=Path, metavar="FOLDER", help="where SGLang's wheel is unpacked: likewise")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on this machine's CPU, under TRITON_INTERPRET=1")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    device = torch.device("cpu" if args.dry else "cuda")
    bench = Bench(
        device, TINY if args.dry else LLAMA_8B, [], repeats=20, dtype=torch.float16 if args.dry else torch.bfloat16
    )
    ops = TritonOps(num_sms=2) if args.dry else TritonOps.for_device(device)
    weights, ranks = build_adapters(bench, 8 if args.dry else args.adapters, layers=1 if args.dry else 4)
    check_lora(bench, ops, weights, ranks)
    check_lora(bench, ops, weights, ranks, rows_each=20)
    if args.sweep:
        shard, shards = args.shard.split("/")
        ops = sweep(bench, ops, weights, ranks, args.parts.split(","), (int(shard), int(shards)))
        check_lora(bench, ops, weights, ranks)
        check_lora(bench, ops, weights, ranks, rows_each=20)
    if not args.sweep or args.shard == "0/1":
        check_attention(bench, ops)
        copy_rate(bench)
        bench_lora(bench, ops, weights, ranks)
        bench_cases(bench, ops, weights, ranks)
        if not args.dry:
            bench_attention(bench, ops)
        layers = weights.modules.shape[1]
        del weights  # slots of the highest rank take twice as much
        if args.vllm:
            sys.path.append(str(args.vllm))  # last: its own pydantic and the like stay behind ours
            bench_peer(bench, "vllm lora", lambda slots: VllmLora(slots, len(slots), device), ranks, layers)
        if args.sglang:
            bench_peer(bench, "sglang lora", lambda slots: SglangLora(args.sglang, slots, ranks, device), ranks, layers)
    if args.out:
        with args.out.open("a") as file:
            file.write(json.dumps(environment(bench, ops) | {"rows": bench.rows}) + "\n")


if __name__ == "__main__":
    main()
