"""What do 2, 5 and 20 fine-tunes of a 1B model cost to serve: as full checkpoints that take turns, or as adapters?

    python benchmarks/bench_cost.py --out cost.jsonl

Requests for all fine-tunes are there at once (or come at --rate, where turns cost patience as well); the same trace is
served in both ways by the same engine. Rows say requests a second, seconds of the GPU for a million tokens, and what
the weights fill on the device and in host memory.
"""

import argparse
import logging
from pathlib import Path

from flora.bench.cost import measure_cost
from flora.bench.row import append_row, encode_row
from flora.bench.script import ints, make_parser, sized_engine, surroundings
from flora.bench.settings import ServeBench, Setting
from flora.bench.shapes import SHAPES


def main() -> None:
    args = parse_args()
    logging.getLogger("flora.serve").setLevel(logging.ERROR)
    engine = sized_engine(
        args.device,
        args.pool_gib,
        args.host_gib,
        max_context=1024,
        max_sequences=args.max_sequences,
        max_batch_tokens=2048 if args.device != "cpu" else 64,
        num_loaders=args.loaders,
        prefix_cache=False,  # one checkpoint's keys and values are none of another's
    )
    setting = Setting(args.shape, "all", args.ranks, args.fine_tunes, args.requests, args.lengths)
    bench = ServeBench(setting=setting, engine=engine, seeds=(args.seed,), rate=args.rate)
    for row in measure_cost(bench, surroundings(args), scratch=args.scratch, tell=tell):
        print(encode_row(row), flush=True)
        if args.out:
            append_row(args.out, row)


def tell(text: str) -> None:
    print("#", text, flush=True)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--shape", default="llama3-1b", choices=sorted(SHAPES))
    parser.add_argument("--fine-tunes", type=ints, default=(2, 5, 20))
    parser.add_argument("--ranks", type=ints, default=(64,), help="of the adapters, on all seven projections")
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--lengths", type=ints, default=(8, 512), help="low,high of prompts and answers")
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second; 0: all at once")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--pool-gib", type=float, default=40.0)
    parser.add_argument("--host-gib", type=float, default=8.0)
    parser.add_argument("--max-sequences", type=int, default=256)
    parser.add_argument("--loaders", type=int, default=8)
    parser.add_argument("--scratch", type=Path, help="where config, registry and adapters go (default: the system's)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
