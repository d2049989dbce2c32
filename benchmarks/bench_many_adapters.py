"""How many requests a second does one GPU serve when they want 0, 5, 100, 1000 different adapters?

    python benchmarks/bench_many_adapters.py --adapters 0,5,100,1000 --out benchmarks/results/many_adapters.jsonl

The engine is driven directly: no HTTP, no detokenising, as the offline API of other engines is. Base weights are drawn
at random; adapters are random files in a registry, each an adapter of its own. Every request is there at t = 0, greedy,
with its length fixed. Cold: when the clock starts, none of the trace's adapters was ever loaded; their files lie in the
page cache. One JSON line a row, with what ran, where, and from which commit.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import triton

from flora.bench.registering import register_random_adapters
from flora.bench.shapes import SHAPES, write_config
from flora.bench.trace import Trace, Workload, draw_trace
from flora.serve.config import EngineConfig
from flora.serve.engine import Engine, build_engine
from flora.serve.messages import StepEvents, Submit
from flora.serve.request import AdapterTarget, SamplingParams

WARM_UP_SEED, WARM_UP_REQUESTS, WARM_UP_ADAPTERS = 7, 40, 8


def main() -> None:
    args = parse_args()
    device = torch.cuda.get_device_properties(0)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch)
        base = write_config(folder / "base", args.shape)
        most = max(args.adapters)
        traces = {(n, seed): draw_trace(workload(args, n), seed) for n in args.adapters for seed in args.seeds}
        indices = {int(i) for (n, _), trace in traces.items() if n for i in trace.adapters}
        warm_up = list(range(most, most + WARM_UP_ADAPTERS))  # of their own: the trace's stay cold
        started = time.perf_counter()
        targets = register_random_adapters(
            folder / "registry", args.shape, args.modules, args.ranks, [*indices, *warm_up], os.cpu_count() or 1
        )
        print(f"# {len(targets)} adapters registered in {time.perf_counter() - started:.1f} s", flush=True)
        for n in args.adapters:
            started = time.perf_counter()
            engine = build_engine(engine_config(args, base, folder, n))
            start_s = time.perf_counter() - started
            run(engine, warm_up_trace(), [targets[i] for i in warm_up] if n else [])
            for order, seed in enumerate(args.seeds):
                trace = traces[n, seed]
                wanted = [targets[int(i)] for i in trace.adapters] if n else []
                row = {
                    "system": "flora",
                    "shape": args.shape,
                    "modules": args.modules,
                    "adapters": n,
                    "distinct": trace.num_distinct if n else 0,
                    "ranks": args.ranks,
                    "requests": trace.num_requests,
                    "rate": 0,
                    "alpha": args.alpha,
                    "seed": seed,
                    "order": "cold" if order == 0 else "warm",
                    "in_tok": trace.in_tokens,
                    "out_tok": trace.out_tokens,
                    "start_s": round(start_s, 1),
                    "max_batch_tokens": args.max_batch_tokens,
                    "pool_gib": round(engine.ready.num_pages * engine.ready.page_bytes / 2**30, 1),
                    "kernels": engine.ready.kernels,
                    **run(engine, trace, wanted),
                    "gpu": device.name,
                    "torch": torch.__version__,
                    "triton": triton.__version__,
                    "commit": args.commit or commit(),
                }
                print(json.dumps(row), flush=True)
                if args.out:
                    with args.out.open("a") as out:
                        out.write(json.dumps(row) + "\n")
            engine.close()
            del engine
            gc.collect()  # an engine is full of cycles, and holds most of the GPU
            torch.cuda.empty_cache()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama3-8b", choices=sorted(SHAPES))
    parser.add_argument("--adapters", type=ints, default=[0, 5, 100, 1000])
    parser.add_argument("--modules", default="attention", choices=("attention", "all"))
    parser.add_argument("--ranks", type=ints, default=[64, 32, 16, 8])
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--seeds", type=ints, default=[42])
    parser.add_argument("--pool-gib", type=float, default=54.0)
    parser.add_argument("--host-gib", type=float, default=28.0)
    parser.add_argument("--max-batch-tokens", type=int, default=2048)
    parser.add_argument("--max-sequences", type=int, default=256)
    parser.add_argument("--loaders", type=int, default=12)
    parser.add_argument("--scratch", help="where config, registry and adapters go (default: the system's own)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="where there is no git")
    return parser.parse_args()


def ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def workload(args: argparse.Namespace, num_adapters: int) -> Workload:
    return Workload(num_requests=args.requests, num_adapters=num_adapters, alpha=args.alpha)


def warm_up_trace() -> Trace:
    return draw_trace(Workload(num_requests=WARM_UP_REQUESTS, num_adapters=WARM_UP_ADAPTERS), WARM_UP_SEED)


def engine_config(args: argparse.Namespace, base: Path, folder: Path, num_adapters: int) -> EngineConfig:
    return EngineConfig(
        base=base,
        registry=str(folder / "registry"),
        cache_dir=folder / "cache",
        device="cuda",
        dtype="bfloat16",
        dummy_weights=True,
        pool_bytes=int(args.pool_gib * 2**30),
        max_context=2048,
        max_sequences=args.max_sequences,
        max_batch_tokens=args.max_batch_tokens,
        max_adapters=1024,
        host_cache_bytes=int((args.host_gib if num_adapters > 8 else 1.5) * 2**30),
        num_loaders=args.loaders if num_adapters else 0,
    )


def run(engine: Engine, trace: Trace, adapters: list[AdapterTarget]) -> dict:
    """Measurements of one pass with every request there at t = 0; the counts are checked against the trace."""
    before = engine.heartbeat()
    started = time.perf_counter()
    for i, prompt in enumerate(trace.prompts):
        sampling = SamplingParams(max_tokens=int(trace.output_lens[i]), temperature=0.0, ignore_eos=True)
        adapter = adapters[int(trace.adapters[i]) if len(adapters) == WARM_UP_ADAPTERS else i] if adapters else None
        engine.submit(Submit(request_id=str(i), prompt=prompt, sampling=sampling, adapter=adapter))
    tokens, finished, first_token_s, step_s, full_s = 0, 0, [], [], None
    seen: set[str] = set()
    while finished < trace.num_requests:
        step_started = time.perf_counter()
        told = engine.step(wait_s=1.0)
        now = time.perf_counter()
        step_s.append(now - step_started)
        if full_s is None and len(engine.scheduler.running) >= engine.scheduler.limits.max_sequences:
            full_s = now - started
        for _, message in told:
            assert isinstance(message, StepEvents), message
            for event in message.events:
                tokens += len(event.token_ids)
                if event.request_id not in seen:
                    seen.add(event.request_id)
                    first_token_s.append(now - started)
                if event.finish_reason:
                    assert event.finish_reason == "length", event
                    finished += 1
    elapsed_s = time.perf_counter() - started
    while not engine.is_idle:
        engine.step()
    assert tokens == trace.out_tokens, (tokens, trace.out_tokens)
    after = engine.heartbeat()
    return {
        "req_s": round(trace.num_requests / elapsed_s, 2),
        "out_tok_s": round(trace.out_tokens / elapsed_s, 1),
        "elapsed_s": round(elapsed_s, 2),
        "full_batch_after_s": round(full_s, 2) if full_s else None,
        "steps": after.steps - before.steps,
        "step_ms_p50": round(statistics.median(step_s) * 1000, 2),
        "ttft_s_p50": round(statistics.median(first_token_s), 2),
        "loads": after.adapter_loads - before.adapter_loads,
        "load_ms_mean": round(
            1000
            * (after.adapter_load_seconds - before.adapter_load_seconds)
            / max(1, after.adapter_loads - before.adapter_loads),
            1,
        ),
        "evictions": after.adapter_evictions - before.adapter_evictions,
        "preemptions": after.preemptions - before.preemptions,
    }


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
