"""How long do a layer's four products take, by the number of rows? A step is padded to a size that cuBLAS is quick at.

    python benchmarks/bench_products.py --shapes llama3-8b,llama-7b --out benchmarks/results/products.jsonl
    python benchmarks/bench_products.py --sms 96,64                which stay the same on part of the multiprocessors?

Weights are read once a step, so three layers' take turns: none is in the cache when its turn comes. Times are those of
CUDA-graph replays, the median of twelve; on a CPU of calls.
"""

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from flora.bench.row import append_row, encode_row
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


@contextmanager
def multiprocessors(count: int) -> Iterator[None]:
    """cuBLAS's products are made for so many of them within; 0: for all."""
    set_target = ctypes.CDLL(f"libcublas.so.{str(torch.version.cuda).partition('.')[0]}").cublasSetSmCountTarget
    handle = ctypes.c_void_p(torch.cuda.current_blas_handle())
    if status := set_target(handle, ctypes.c_int(count)):
        raise SystemExit(f"cublasSetSmCountTarget({count}) gave {status}")
    try:
        yield
    finally:
        set_target(handle, ctypes.c_int(0))


def on_part(
    step: Callable[[], None], product: Callable[[], torch.Tensor], sms: int, device: torch.device
) -> dict[str, object]:
    """Of a layer's product on that many multiprocessors: its time, and whether its bits are those of all of them."""
    wanted = product()
    with multiprocessors(sms):
        return {"us": round(median_us(step, device), 1), "same_bits": torch.equal(product(), wanted)}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--shapes", default="llama3-8b,llama-7b")
    parser.add_argument("--rows", type=ints, default=ROWS)
    parser.add_argument("--sms", type=ints, default=(), help="on so many multiprocessors, too; a GPU's")
    args = parser.parse_args()
    if args.sms and torch.device(args.device).type != "cuda":
        parser.error("--sms is of a GPU")
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
            us: dict[str, float] = {}
            parts: dict[str, dict[str, object]] = {str(sms): {} for sms in args.sms}
            for name, (inputs, _) in sizes.items():
                x = torch.randn(rows, inputs, device=device).to(dtype)

                def step(x: torch.Tensor = x, stored: list[torch.Tensor] = weights[name]) -> None:
                    for weight in stored:
                        F.linear(x, weight)

                def product(x: torch.Tensor = x, weight: torch.Tensor = weights[name][0]) -> torch.Tensor:
                    return F.linear(x, weight)

                us[name] = round(median_us(step, device), 1)
                for sms in args.sms:
                    parts[str(sms)][name] = on_part(step, product, sms, device)
            row = {"bench": "products", "shape": shape, "rows": rows, "us": us, "layer_us": round(sum(us.values()), 1)}
            row |= {"on_multiprocessors": parts} if parts else {}
            row |= {"dtype": str(dtype), "seed": SEED} | place_facts(where)
            print(encode_row(row), flush=True)
            if args.out:
                append_row(args.out, row)


if __name__ == "__main__":
    main()
