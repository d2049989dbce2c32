"""How long does one stream wait for its tokens, with and without an adapter, and for an adapter that must be fetched?

    python benchmarks/bench_latency.py --out benchmarks/results/latency.jsonl

One request at a time, greedy, random weights, the engine driven directly. Time per token: the median gap of a long
answer. First token: the base; an adapter whose weights are on the GPU; one in the host cache; one in its file only.
One JSON line a row.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path

import triton

import flora
from flora.bench.engines import running_engine
from flora.bench.registering import register_random_adapters
from flora.bench.row import append_row, encode_row
from flora.bench.script import make_parser, place_facts, sized_engine, surroundings
from flora.bench.shapes import SHAPES, write_config
from flora.serve.config import EngineConfig
from flora.serve.engine import Engine
from flora.serve.messages import StepEvents, Submit
from flora.serve.request import AdapterTarget, SamplingParams

PROMPT_TOKENS, ANSWER_TOKENS, REPEATS = 64, 256, 9


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = write_config(folder / "base", args.shape)
        num_processes = (os.cpu_count() or 1) if args.device != "cpu" else 1
        targets = register_random_adapters(
            folder / "registry", args.shape, args.modules, [args.rank], range(REPEATS + 1), num_processes
        )
        with running_engine(engine_config(args, base, folder)) as engine:
            ask(engine, targets[0], 16)
            row = {
                "system": "flora",
                "bench": "latency",
                "label": "latency" if args.beside_rows is None else f"latency/beside-{args.beside_rows}",
                "version": flora.__version__,
                "shape": args.shape,
                "modules": args.modules,
                "rank": args.rank,
                "prompt_tokens": PROMPT_TOKENS,
                "kernels": engine.ready.kernels,
                "tpot_base_ms": tpot_ms(engine, None),
                "tpot_adapter_ms": tpot_ms(engine, targets[0]),
                "ttft_base_ms": summary([ask(engine, None, 1)[0] for _ in range(REPEATS)]),
                "ttft_resident_ms": summary([ask(engine, targets[0], 1)[0] for _ in range(REPEATS)]),
                "ttft_file_ms": summary([ask(engine, targets[i], 1)[0] for i in range(1, REPEATS + 1)]),
                "ttft_host_ms": summary(
                    [ask(engine, evicted(engine, targets[i]), 1)[0] for i in range(1, REPEATS + 1)]
                ),
                "triton": triton.__version__,
            } | place_facts(surroundings(args))
    print(encode_row(row), flush=True)
    if args.out:
        append_row(args.out, row)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--shape", default="llama3-8b", choices=sorted(SHAPES))
    parser.add_argument("--modules", default="all", choices=("attention", "all"))
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--pool-gib", type=float, default=40.0)
    parser.add_argument("--host-gib", type=float, default=8.0)
    parser.add_argument("--loaders", type=int, default=4)
    parser.add_argument("--beside-rows", type=int, help="EngineConfig.beside_rows, where it is not the default")
    return parser.parse_args()


def engine_config(args: argparse.Namespace, base: Path, folder: Path) -> EngineConfig:
    changes = {} if args.beside_rows is None else {"beside_rows": args.beside_rows}
    return sized_engine(
        args.device,
        args.pool_gib,
        args.host_gib,
        base=base,
        registry=str(folder / "registry"),
        cache_dir=folder / "cache",
        dummy_weights=True,
        max_context=2048,
        max_sequences=256,
        max_batch_tokens=2048,
        num_loaders=args.loaders,
        **changes,
    )


def ask(engine: Engine, adapter: AdapterTarget | None, num_tokens: int) -> list[float]:
    """Milliseconds from the request to its first token, and between its tokens after that."""
    prompt = tuple(range(100, 100 + PROMPT_TOKENS))
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    told = [time.perf_counter()]
    engine.submit(Submit(request_id="it", prompt=prompt, sampling=sampling, adapter=adapter))
    while not engine.is_idle:
        for _, message in engine.step(wait_s=1.0):
            assert isinstance(message, StepEvents), message
            told += [time.perf_counter()] * sum(len(event.token_ids) for event in message.events)
    assert len(told) == num_tokens + 1, told
    return [1000 * (after - before) for before, after in itertools.pairwise(told)]


def tpot_ms(engine: Engine, adapter: AdapterTarget | None) -> dict[str, float]:
    return summary(ask(engine, adapter, ANSWER_TOKENS)[1:])


def evicted(engine: Engine, adapter: AdapterTarget) -> AdapterTarget:
    """The adapter, now in host memory alone."""
    assert engine.host.num_pages(adapter.serving_digest) is not None
    engine.residency.remove(adapter.serving_digest)
    return adapter


def summary(values_ms: list[float]) -> dict[str, float]:
    ordered = sorted(values_ms)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"p50": round(statistics.median(ordered), 3), "p99": round(p99, 3), "min": round(ordered[0], 3)}


if __name__ == "__main__":
    main()
