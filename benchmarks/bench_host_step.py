"""What CPU time does the host's part of a GPU step take: plan, fill the inputs, put the drawn tokens in their place?

    python benchmarks/bench_host_step.py --out benchmarks/results/host_step.jsonl

Engine, scheduler and StepFiller are the real ones; in place of the device stands a runner whose tokens come at once. So
this is everything that the interpreter does in a step but launching the graph and waiting for it. CPU time, not wall
time: other work on the machine moves it little.
"""

import argparse
import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from flora.serve.engine import Engine
from flora.serve.engine.cuda.filling import StepFiller
from flora.serve.engine.cuda.inputs import InputSizes, StepInputs
from flora.serve.engine.cuda.lanes import Lanes
from flora.serve.engine.layout import PoolGeometry
from flora.serve.engine.loading.loader import ThreadLoader
from flora.serve.engine.loading.packing import PackedAdapter
from flora.serve.engine.pool import DevicePool
from flora.serve.engine.sampler import Drawn
from flora.serve.engine.schedule.pages import PagePool
from flora.serve.engine.schedule.policy import Policy
from flora.serve.engine.schedule.residency import Resident
from flora.serve.engine.schedule.scheduler import Chunk, Limits
from flora.serve.engine.tables import AdapterTables
from flora.serve.messages import Ready, Submit
from flora.serve.request import AdapterTarget, SamplingParams

PAGE_TOKENS, MAX_CONTEXT, MAX_ROWS, TOKEN = 16, 2048, 2048, 7


@dataclass(frozen=True)
class Drawing:
    """A step whose tokens are there: every row draws the same."""

    sampled: list[Chunk]

    def collect(self) -> list[tuple[Chunk, Drawn]]:
        return [(chunk, Drawn(TOKEN)) for chunk in self.sampled]


class NoDevice:
    """A runner that fills a step's inputs as the GPU's does, and computes nothing."""

    overlaps = True

    def __init__(self, pool: DevicePool, num_sequences: int) -> None:
        self.pool = pool
        self.tables = AdapterTables(1024, pool.geometry.num_planes, pool.cells)
        table_pages = pool.geometry.pages_for_tokens(MAX_CONTEXT)
        sizes = InputSizes(MAX_ROWS, num_sequences, table_pages)
        inputs, lanes = StepInputs(sizes, torch.device("cpu")), Lanes(2 * num_sequences, table_pages)
        self._filler = StepFiller(inputs, lanes, PAGE_TOKENS, lambda: self.tables.ranks)

    def write_adapter(self, resident: Resident, packed: PackedAdapter) -> None:
        raise NotImplementedError

    def settle(self, digest: str) -> None:
        pass

    def launch(self, chunks: Sequence[Chunk], adapter_slots: Sequence[int | None]) -> Drawing:
        order = self._filler.order(chunks, adapter_slots)
        chunks = [chunks[i] for i in order]
        slots = np.array([-1 if (slot := adapter_slots[i]) is None else slot for i in order], dtype=np.int32)
        counts = np.fromiter((chunk.count for chunk in chunks), np.int64, len(chunks))
        self._filler.fill(chunks, counts, slots, int(counts.sum()))
        return Drawing([chunk for chunk in chunks if chunk.samples])


def no_adapter(target: AdapterTarget) -> PackedAdapter:
    raise NotImplementedError(target)


def make_engine(num_sequences: int, policy: Policy) -> Engine:
    num_pages = num_sequences * MAX_CONTEXT // PAGE_TOKENS // 2
    geometry = PoolGeometry(
        num_planes=1, num_pages=num_pages, page_tokens=PAGE_TOKENS, num_kv_heads=1, head_dim=2, itemsize=2
    )
    ready = Ready(
        base_id="",
        max_context=MAX_CONTEXT,
        vocab_size=32_000,
        num_pages=num_pages,
        page_tokens=PAGE_TOKENS,
        page_bytes=geometry.page_bytes,
        device="none",
        dtype="bfloat16",
        kernels={},
        engine_pid=os.getpid(),
    )
    return Engine(
        ready,
        NoDevice(DevicePool(geometry, torch.bfloat16, torch.device("cpu")), num_sequences),
        PagePool(num_pages),
        Limits(PAGE_TOKENS, num_sequences, MAX_ROWS, max_waiting=4096),
        policy,
        ThreadLoader(no_adapter, lambda: None),
        num_slots=1024,
        host_cache_bytes=1 << 30,
    )


def measure(engine: Engine, num_sequences: int, steps: int) -> dict[str, float]:
    """Milliseconds of CPU time a step, while all of them decode."""
    sampling = SamplingParams(max_tokens=steps + 200, temperature=0.0, ignore_eos=True)
    for i in range(num_sequences):
        engine.submit(Submit(request_id=str(i), prompt=tuple(range(i, i + 64)), sampling=sampling, adapter=None))
    for _ in range(100):
        engine.step()
    assert len(engine.scheduler.running) == num_sequences
    taken = []
    for _ in range(steps):
        started = time.process_time()
        engine.step()
        taken.append(1000 * (time.process_time() - started))
    taken.sort()
    p99 = taken[int(0.99 * steps)]
    return {"host_ms_p50": round(statistics.median(taken), 3), "host_ms_p99": round(p99, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--profile", action="store_true", help="then show where the time goes")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, policy in (("plain", Policy()), ("as served", Policy(fairness=True, prefix_cache=True))):
        engine = make_engine(args.sequences, policy)
        row = {
            "bench": "host_step",
            "policy": name,
            "sequences": args.sequences,
            **measure(engine, args.sequences, args.steps),
            "python": sys.version.split()[0],
            "commit": commit(),
        }
        print(json.dumps(row), flush=True)
        if args.out:
            with args.out.open("a") as out:
                out.write(json.dumps(row) + "\n")
        if args.profile:
            with cProfile.Profile() as profile:
                for _ in range(100):
                    engine.step()
            pstats.Stats(profile).sort_stats("tottime").print_stats(12)
        engine.close()


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
