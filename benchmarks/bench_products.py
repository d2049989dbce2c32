"""How long do a layer's four products take, by the number of rows? A step is padded to a size that cuBLAS is quick at.

    python benchmarks/bench_products.py --shapes llama3-8b,llama-7b --out benchmarks/results/products.jsonl

Weights are read once a step, so three layers' take turns: none is in the cache when its turn comes. Times are those of
CUDA-graph replays, the median of twelve; on a CPU of calls.
"""

import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from flora.bench.script import ints, make_parser, place_facts, surroundings
from flora.bench.shapes import SHAPES

LAYERS, REPEATS, SEED = 3, 12, 0
ROWS = (64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280,
        1536, 1792, 2048)  # fmt: skip


def products(shape: str) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a layer's four."""
    config = SHAPES[shape]
    hidden, ff, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return {"qkv": (hidden, q + 2 * kv), "o": (q, hidden), "gate_up": (hidden, 2 * ff), "down": (ff, hidden)}


def median_us(step: Callable[[], None], device: torch.device) -> float:
    """Of a layer."""
    step()
    if device.type != "cuda":
        times = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            step()
            times.append((time.perf_counter() - started) * 1e3)
        return statistics.median(times) / LAYERS * 1e3
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / LAYERS * 1e3


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--shapes", default="llama3-8b,llama-7b")
    parser.add_argument("--rows", type=ints, default=ROWS)
    args = parser.parse_args()
    where, device = surroundings(args), torch.device(args.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    torch.manual_seed(SEED)
    for shape in args.shapes.split(","):
        sizes = products(shape)
        weights = {
            name: [torch.randn(outputs, inputs, device=device).to(dtype) for _ in range(LAYERS)]
            for name, (inputs, outputs) in sizes.items()
        }
        for rows in args.rows:
            us = {}
            for name, (inputs, _) in sizes.items():
                x = torch.randn(rows, inputs, device=device).to(dtype)

                def step(x: torch.Tensor = x, stored: list[torch.Tensor] = weights[name]) -> None:
                    for weight in stored:
                        F.linear(x, weight)

                us[name] = round(median_us(step, device), 1)
            row = {"bench": "products", "shape": shape, "rows": rows, "us": us, "layer_us": round(sum(us.values()), 1)}
            line = json.dumps(row | {"dtype": str(dtype), "seed": SEED} | place_facts(where))
            print(line, flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
