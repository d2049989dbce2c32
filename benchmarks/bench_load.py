"""How long does an adapter take from its file in the page cache to packed host memory, checked on the way?

    python benchmarks/bench_load.py --ranks 64,32,16,8 --out benchmarks/results/load.jsonl

In bf16, as a GPU's server has it, or in fp8 with --adapter-dtype float8_e4m3fn. No adapter is loaded twice by one
process, so each is checked as a server checks it the first time. `pack`: reading, checking and packing in this process,
a new registry each time, wall and CPU. `loader`: a loader process of the server's, from the question to the packed
range of an arena that it has not written to yet, and whose memory is there, as a server's is once it is page-locked.
One JSON line a rank.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch

import flora
from flora.bench.registering import register_random_adapters
from flora.bench.row import append_row, encode_row
from flora.bench.script import ints, make_parser, place_facts, sized_engine, surroundings
from flora.bench.shapes import FILES_PER_RANK, SHAPES, write_config
from flora.serve.config import EngineConfig
from flora.serve.engine.build import adapter_source
from flora.serve.engine.loading.arena import Arena
from flora.serve.engine.loading.loader import LoadFailed
from flora.serve.engine.loading.processes import ProcessLoader
from flora.serve.request import AdapterTarget

_SLACK = 1.25  # of an arena: pages are filled to their end


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)  # as a loader
    for rank in args.ranks:
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
            row = measure(args, rank, Path(folder))
        print(encode_row(row), flush=True)
        if args.out:
            append_row(args.out, row)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.set_defaults(device="cpu")  # memory that is not page-locked, here or there
    parser.add_argument("--shape", default="llama3-8b", choices=sorted(SHAPES))
    parser.add_argument("--modules", default="attention", choices=("attention", "all"))
    parser.add_argument("--adapter-dtype", choices=["float8_e4m3fn"], help="of what is packed")
    parser.add_argument("--ranks", type=ints, default=(64, 32, 16, 8))
    parser.add_argument("--scratch", type=Path, help="where the registry lies, such as /dev/shm")
    return parser.parse_args()


def measure(args: argparse.Namespace, rank: int, folder: Path) -> dict[str, Any]:
    base = write_config(folder / "base", args.shape)
    found = register_random_adapters(folder / "registry", args.shape, args.modules, [rank], range(FILES_PER_RANK), 1)
    config = sized_engine(
        args.device, 64, 1, base=base, registry=str(folder / "registry"), cache_dir=folder, dummy_weights=True
    )
    config = msgspec.structs.replace(config, dtype="bfloat16", adapter_dtype=args.adapter_dtype)
    targets = list(found.values())
    packed = [pack(config, target) for target in targets]
    loaded = list(load(config, targets, num_bytes=packed[0][2]))
    return {
        "bench": "load",
        "label": f"load/{args.modules}/{rank}{'/fp8' if args.adapter_dtype else ''}",
        "version": flora.__version__,
        "shape": args.shape,
        "modules": args.modules,
        "rank": rank,
        "adapter_dtype": args.adapter_dtype,
        "num_bytes": packed[0][2],
        "pack_ms": spread([wall_s for wall_s, _, _ in packed]),
        "pack_cpu_ms": spread([cpu_s for _, cpu_s, _ in packed]),
        "loader_ms": spread(loaded[1:]),  # the first also opens the registry
        "load": round(os.getloadavg()[0], 2),
    } | place_facts(surroundings(args))


def pack(config: EngineConfig, target: AdapterTarget) -> tuple[float, float, int]:
    """Seconds, CPU seconds and bytes of one adapter, by a source that knows none."""
    source = adapter_source(config)
    try:
        found = source.find(target)
        elements = source.geometry.adapter_cell_elements
        cells = torch.zeros(found.num_cells, elements, dtype=source.dtype)  # its pages are there
        cpu_s, start_s = time.process_time(), time.perf_counter()
        source.pack(found, cells)
        return time.perf_counter() - start_s, time.process_time() - cpu_s, cells.nbytes
    finally:
        source.close()


def load(config: EngineConfig, targets: list[AdapterTarget], num_bytes: int) -> Iterator[float]:
    """Seconds of each, one after the other, by one loader process."""
    source = adapter_source(config)
    arena = Arena(int(_SLACK * num_bytes * len(targets)), pinned=False)
    arena.memory.zero_()  # page-locking does so
    loader = ProcessLoader(config, source.geometry, source.dtype, arena, 1, on_finished=lambda: None)
    try:
        for target in targets:
            loader.start(target)
            finished: list[Any] = []
            while not finished:
                finished = loader.finished(timeout_s=10.0)
            if isinstance(finished[0], LoadFailed):
                raise finished[0].error
            yield finished[0].load_s
    finally:
        loader.close()


def spread(seconds: list[float]) -> dict[str, float]:
    ms = [1000 * each for each in seconds]
    return {"p50": round(statistics.median(ms), 1), "min": round(min(ms), 1), "max": round(max(ms), 1)}


if __name__ == "__main__":
    main()
