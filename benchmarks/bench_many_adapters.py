"""How many requests a second does one GPU serve when they want 0, 5, 100, 1000 different adapters?

    python benchmarks/bench_many_adapters.py --adapters 0,5,100,1000 --out benchmarks/results/many_adapters.jsonl

`flora bench serve` with all requests at t = 0, its sizes in GiB, and a JSON line on stdout for each row as it comes.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch

from flora.bench.facts import Surroundings
from flora.bench.row import append_row, commit_of_this_code, encode_row
from flora.bench.serving import measure_engine
from flora.bench.settings import SETTINGS, ServeBench, Setting
from flora.bench.shapes import SHAPES
from flora.serve.config import EngineConfig

G1 = SETTINGS["G1"]


def main() -> None:
    args = parse_args()
    logging.getLogger("flora.serve").setLevel(logging.ERROR)  # of a thousand adapters, a line each
    setting = Setting(args.shape, args.modules, args.ranks, args.adapters, num_requests=args.requests)
    engine = EngineConfig(
        base=Path(),
        registry="",
        cache_dir=Path(),
        device="cuda",
        dtype="bfloat16",
        pool_bytes=int(args.pool_gib * 2**30),
        max_context=2048,
        max_sequences=args.max_sequences,
        max_batch_tokens=args.max_batch_tokens,
        max_adapters=1024,
        host_cache_bytes=int(args.host_gib * 2**30),
        num_loaders=args.loaders,
        prefix_cache=False,  # prompts are compared as if nothing of them had been computed before, as on other engines
    )
    bench = ServeBench(setting=setting, engine=engine, seeds=args.seeds, alpha=args.alpha)
    where = Surroundings(args.commit or commit_of_this_code(), torch.cuda.get_device_name(0))
    for row in measure_engine(bench, where, scratch=args.scratch, tell=lambda text: print("#", text, flush=True)):
        print(encode_row(row), flush=True)
        if args.out:
            append_row(args.out, row)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default=G1.shape, choices=sorted(SHAPES))
    parser.add_argument("--adapters", type=ints, default=G1.adapters)
    parser.add_argument("--modules", default=G1.modules, choices=("attention", "all"))
    parser.add_argument("--ranks", type=ints, default=G1.ranks)
    parser.add_argument("--requests", type=int, default=G1.num_requests)
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--seeds", type=ints, default=(42,))
    parser.add_argument("--pool-gib", type=float, default=54.0)
    parser.add_argument("--host-gib", type=float, default=28.0)
    parser.add_argument("--max-batch-tokens", type=int, default=2048)
    parser.add_argument("--max-sequences", type=int, default=256)
    parser.add_argument("--loaders", type=int, default=12)
    parser.add_argument("--scratch", type=Path, help="where config, registry and adapters go (default: the system's)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="where there is no git")
    return parser.parse_args()


def ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
