"""What do a step's low-rank terms take: with prompts in the list of rows that decode, and in a list of their own?

    python benchmarks/bench_joint.py --shapes llama3-8b,llama-7b --out benchmarks/results/joint.jsonl

q, k, v and o of a layer, product included, as a step's graph has them: 240 rows that decode, each with an adapter of
its own, of 100 adapters, of five; and prompts of two adapters more. Three layers take turns, so that no adapter is in
the cache when its turn comes. Times are those of CUDA-graph replays, medians of twenty; on a CPU of calls.
"""

import dataclasses
import random
from collections.abc import Iterator
from itertools import groupby

import torch
from kernel_world import LLAMA_8B, QKVO, SEED, TINY, Bench, build_adapters, cut_work, listed, relative

from flora.bench.row import append_row, encode_row
from flora.bench.script import ints, make_parser, place_facts, surroundings
from flora.kernels import (
    SEGMENT_ROWS,
    AdapterWeights,
    LoraWork,
    Ops,
    PackedLinear,
    ReferenceOps,
    Segment,
    SideStream,
    cut_runs,
    project,
)
from flora.serve.engine.batch import PREFILL_BLOCK_ROWS

MODELS = {
    "llama3-8b": LLAMA_8B,
    "llama-7b": dataclasses.replace(LLAMA_8B, kv=4096, ff=11008, kv_heads=32),
    "tiny": TINY,
}
LAYERS, DECODING, SEQUENCES = 3, 240, 256  # as many sequences as may run
ADAPTERS = {"own": DECODING, "of 100": 100, "of 5": 5}


def runs_of(slots: list[int]) -> list[Segment]:
    """Runs of a row for each of `slots`, which rise."""
    runs, row = [], 0
    for slot, same in groupby(slots):
        count = len(list(same))
        runs.append((slot, row, count))
        row += count
    return runs


def works(
    bench: Bench, decoding: list[Segment], prompts: list[Segment], rows: int, ranks: list[int]
) -> Iterator[tuple[str, list[LoraWork]]]:
    """(name, the work), cut as the engine cuts it, in lists with as much room: grids hang on it."""

    alone = cut_work(bench, decoding, ranks, SEQUENCES)
    yield "no prompts", [alone]
    segments = cut_runs(prompts, PREFILL_BLOCK_ROWS, ranks)
    wide = listed(bench, segments, PREFILL_BLOCK_ROWS, ranks, capacity=SEQUENCES + rows // PREFILL_BLOCK_ROWS)
    yield "apart", [alone, LoraWork(wide, wide)]
    yield "joint", [cut_work(bench, [*decoding, *prompts], ranks, SEQUENCES + rows // SEGMENT_ROWS)]


def time_step(
    bench: Bench, ops: Ops, weights: AdapterWeights, rows: int, named: Iterator[tuple[str, list[LoraWork]]]
) -> Iterator[tuple[str, float]]:
    """(name, microseconds a layer) of each; their results agree, or the run ends."""
    side, model, wanted = SideStream(bench.device), bench.model, None

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=bench.device).to(bench.dtype)

    data = {g: (PackedLinear(randn(sum(model.outs(g)[1]), model.hidden) / 64), randn(rows, model.hidden)) for g in QKVO}
    for name, work in named:

        def step(work: list[LoraWork] = work) -> list[torch.Tensor]:
            return [
                project(ops, linear, x, weights, model.place(layer, group), work, side)
                for layer in range(LAYERS)
                for group, (linear, x) in data.items()
            ]

        found = torch.cat([y.flatten().float() for y in step()])
        if name != "no prompts":
            wanted = found if wanted is None else wanted
            bench.check(check=name, error=relative(found, wanted))
        yield name, bench.seconds(step) / LAYERS * 1e6


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--shapes", default="llama3-8b,llama-7b")
    parser.add_argument("--prompt-rows", type=ints, default=(128, 256, 336, 512, 768))
    args = parser.parse_args()
    where, device = surroundings(args), torch.device(args.device)
    torch.manual_seed(SEED)
    ops: Ops = ReferenceOps()
    if device.type == "cuda":
        from flora.kernels.triton_ops import TritonOps

        ops = TritonOps.for_device(device)
    for shape in args.shapes.split(","):
        bench = Bench(device, MODELS[shape], [], 20, torch.float32 if device.type == "cpu" else torch.bfloat16)
        weights, ranks = build_adapters(bench, DECODING + 2, LAYERS)
        for case, count in ADAPTERS.items():
            drawn = random.Random(SEED)
            slots = range(DECODING) if count == DECODING else sorted(drawn.choices(range(count), k=DECODING))
            decoding = runs_of(list(slots))
            for prompt_rows in args.prompt_rows:
                half = prompt_rows // 2
                prompts = [(DECODING + i, DECODING + i * half, half) for i in range(2)]
                rows = DECODING + 2 * half
                named = works(bench, decoding, prompts, rows, ranks)
                us = {name: round(took, 1) for name, took in time_step(bench, ops, weights, rows, named)}
                row = {"bench": "joint", "shape": shape, "adapters": case, "decoding": DECODING, "us": us}
                row |= {"prompt_rows": 2 * half, "kernels": ops.name, "seed": SEED} | place_facts(where)
                print(encode_row(row), flush=True)
                if args.out:
                    append_row(args.out, row)


if __name__ == "__main__":
    main()
