"""What would a schedule give on another device? The engine's own, over a device that only counts what a step costs.

    python benchmarks/simulate.py S2 5 2000                    requests/s of S-LoRA's settings, 62 GiB, over each number
    python benchmarks/simulate.py S2 200 --pool-gib 7.08 --requests 400 --fixed-slots 24
    python benchmarks/simulate.py S2 5 --merged 20480
    python benchmarks/simulate.py S2 5 2000 --fp8              adapters of a byte a number
    python benchmarks/simulate.py S2 5 2000 --only-reads       what no kernel could beat that reads beside nothing

Engine, scheduler, pages, residency and supply are the real ones; time is a number that steps, copies and loads move
on. Costs are an H100's as they were measured (benchmarks/NOTES.md): it tells where time goes and what a policy is
worth, and proves no throughput. It is fitted to those of e118bbd, and within 2.5 % of all fifteen.
"""

import argparse
import json
import math
import os
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from flora.bench.asks import asks_of
from flora.bench.engines import adapter_bytes
from flora.bench.in_process import drive_engine
from flora.bench.merged import drive_merged
from flora.bench.row import append_row, encode_row
from flora.bench.settings import SETTINGS, Setting
from flora.bench.shapes import SHAPES
from flora.bench.trace import Workload, draw_trace
from flora.serve.engine import Engine
from flora.serve.engine.batch import JOINT_ROWS
from flora.serve.engine.cuda.graphs import decode_sizes, mixed_sizes
from flora.serve.engine.layout import AdapterTable
from flora.serve.engine.loading.loader import Finished
from flora.serve.engine.loading.packing import PackedAdapter
from flora.serve.engine.sampler import Drawn
from flora.serve.engine.schedule.pages import PagePool
from flora.serve.engine.schedule.policy import Policy
from flora.serve.engine.schedule.residency import Resident
from flora.serve.engine.schedule.scheduler import Chunk, Limits
from flora.serve.messages import Ready
from flora.serve.request import AdapterTarget

PAGE_TOKENS, TOKEN = 16, 7
PRODUCTS = Path(__file__).parent / "results" / "products.jsonl"
SIZES = {*decode_sizes(256), *mixed_sizes(2048)}  # rows that steps are padded to


@dataclass
class Time:
    """Seconds, moved on by whoever takes them."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s

    def now(self) -> float:
        return self.now_s

    def sleep_until(self, moment_s: float) -> None:
        self.now_s = max(self.now_s, moment_s)


@dataclass(frozen=True)
class Costs:
    """Of one H100 80GB."""

    products: Sequence[tuple[int, float]]  # (rows, seconds) of a step, rising: it is padded to the next
    kv_bytes: int  # of a token, all layers
    attention_rate: float  # bytes a second
    adapters_s: float = 0.26e-3  # of a step that has any: launches, as far as products do not hide them
    adapter_s: float = 2e-6  # and of each of them,
    read_rate: float = 3.3e12  # of its bytes, once,
    multiply_rate: float = 30e12  # and of those of each row's own
    prompts_s: float = 0.15e-3  # of prompts' own list of low-rank terms, and each of its rows
    prompt_row_s: float = 3.0e-6
    joint_row_s: float = 1.2e-6  # of prompts' rows in the list of those that decode
    step_s: float = 0.5e-3  # everything else
    row_s: float = 3.4e-6  # of each row: norms, rotation, prefill attention, sampling
    bus_rate: float = 50e9
    load_rate: float = 2.0e9  # of one loader
    load_s: float = 7e-3  # of it whatever the adapter holds
    plan_s: float = 1.5e-3

    def only_reads(self) -> "Costs":
        """Of adapters nothing but their bytes, once a step."""
        free = dict.fromkeys(("adapters_s", "adapter_s", "prompts_s", "prompt_row_s", "joint_row_s"), 0.0)
        return replace(self, **free, multiply_rate=math.inf)

    def in_fp8(self) -> "Costs":
        """An adapter's numbers take a byte, and as long to multiply and to pack."""
        return replace(self, multiply_rate=self.multiply_rate / 2, load_rate=self.load_rate / 2)

    def products_s(self, rows: int) -> float:
        """Of a step of so many rows; beyond the largest size in proportion."""
        largest, longest_s = self.products[-1]
        if rows > largest:
            return longest_s * rows / largest
        return self.products[bisect_left(self.products, (rows, 0.0))][1]


def costs_of(shape: str) -> Costs:
    config = SHAPES[shape]
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    kv = config["num_key_value_heads"] * hidden // config["num_attention_heads"]
    head_s = 2 * hidden * config["vocab_size"] / 2.6e12
    return Costs(
        products=[(rows, layers * layer_s + head_s) for rows, layer_s in layer_products(shape)],
        kv_bytes=4 * kv * layers,
        attention_rate=3.08e12 if config["num_key_value_heads"] >= 32 else 2.58e12,  # contexts as in a run
    )


def layer_products(shape: str) -> list[tuple[int, float]]:
    """(rows, seconds) of a layer's products: as bench_products.py measured them, or by bytes and operations."""
    lines = [json.loads(line) for line in PRODUCTS.read_text().splitlines()]
    measured = {line["rows"]: line["layer_us"] / 1e6 for line in lines if line["shape"] == shape}
    if measured:
        return sorted((rows, layer_s) for rows, layer_s in measured.items() if rows in SIZES)
    config = SHAPES[shape]
    hidden, ff = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * hidden // config["num_attention_heads"]
    parameters = 2 * hidden * (hidden + kv) + 3 * hidden * ff
    return [(rows, 2 * parameters * max(1 / 2.85e12, rows / 600e12)) for rows in sorted(SIZES)]


@dataclass
class Step:
    """On its way; its tokens are there when time has come to its end."""

    time: Time
    sampled: list[Chunk]
    end_s: float

    def collect(self) -> list[tuple[Chunk, Drawn]]:
        self.time.sleep_until(self.end_s)
        return [(chunk, Drawn(TOKEN)) for chunk in self.sampled]


class NoMemory:
    def poison(self, pages: Sequence[int]) -> None:
        pass


@dataclass
class Device:
    """A runner that computes nothing: one step after another, copies beside them."""

    time: Time
    costs: Costs
    overlaps: bool = True
    pool: NoMemory = field(default_factory=NoMemory)
    free_s: float = 0.0  # when the last step that was launched ends
    bus_free_s: float = 0.0
    held: dict[int, int] = field(default_factory=dict)  # slot -> bytes
    arrives_s: dict[int, float] = field(default_factory=dict)

    def write_adapter(self, resident: Resident, packed: PackedAdapter) -> None:
        self.bus_free_s = max(self.bus_free_s, self.time.now_s) + packed.num_bytes / self.costs.bus_rate
        self.held[resident.slot] = packed.num_bytes
        self.arrives_s[resident.slot] = max(self.bus_free_s, self.free_s)

    def remove_adapter(self, slot: int) -> None:
        self.held.pop(slot)

    def settle(self, digest: str) -> None:
        pass

    def launch(self, chunks: Sequence[Chunk], adapter_slots: Sequence[int | None]) -> Step:
        costs, slots = self.costs, {slot for slot in adapter_slots if slot is not None}
        rows, prompts = sum(chunk.count for chunk in chunks), sum(chunk.count for chunk in chunks if chunk.count > 1)
        context = sum(chunk.start + 1 for chunk in chunks if chunk.count == 1)
        took_s = costs.step_s + costs.products_s(rows) + rows * costs.row_s
        took_s += context * costs.kv_bytes / costs.attention_rate
        if slots:
            rows_bytes = sum(self.held[slot] for slot in adapter_slots if slot is not None)
            read_bytes = sum(self.held[slot] for slot in slots)
            took_s += costs.adapters_s + len(slots) * costs.adapter_s
            took_s += read_bytes / costs.read_rate + rows_bytes / costs.multiply_rate
            if rows <= JOINT_ROWS:
                took_s += prompts * costs.joint_row_s
            elif prompts:
                took_s += costs.prompts_s + prompts * costs.prompt_row_s
        start_s = max(self.time.now_s, self.free_s, *(self.arrives_s.pop(slot, 0.0) for slot in slots), 0.0)
        self.free_s = start_s + took_s
        self.time.now_s += costs.plan_s
        return Step(self.time, [chunk for chunk in chunks if chunk.samples], self.free_s)


class Loaders:
    """Loads that take as long as an adapter is large, each loader one after another."""

    def __init__(self, time: Time, costs: Costs, num_bytes: Callable[[str], int], page_bytes: int, count: int) -> None:
        self.max_loading = 4 * count  # the real loaders' is 2 to 9 times by what loads take; it changes no figure here
        self._time = time
        self._costs = costs
        self._num_bytes = num_bytes
        self._page_bytes = page_bytes
        self._free_s = [0.0] * count
        self._on_way: list[tuple[float, PackedAdapter]] = []

    def use_cache(self, make_room: Callable[[int], bool]) -> None:
        pass

    def give_room(self) -> None:
        pass

    def start(self, target: AdapterTarget) -> None:
        num_bytes = self._num_bytes(target.serving_digest)
        load_s = self._costs.load_s + num_bytes / self._costs.load_rate
        loader = min(range(len(self._free_s)), key=self._free_s.__getitem__)
        self._free_s[loader] = max(self._time.now_s, self._free_s[loader]) + load_s
        cells = torch.empty(num_bytes, dtype=torch.uint8, device="meta")
        pages = -(-num_bytes // self._page_bytes)
        packed = PackedAdapter(target.serving_digest, AdapterTable(b"", b"", 1, 0), cells, pages, load_s)
        self._on_way.append((self._free_s[loader], packed))

    def finished(self, timeout_s: float = 0.0) -> list[Finished]:
        if timeout_s and self._on_way:
            next_s = min(done_s for done_s, _ in self._on_way)
            self._time.sleep_until(min(next_s, self._time.now_s + timeout_s))
        now_s = self._time.now_s
        done = [packed for done_s, packed in self._on_way if done_s <= now_s]
        self._on_way = [(done_s, packed) for done_s, packed in self._on_way if done_s > now_s]
        return list(done)

    def close(self) -> None:
        pass


def make_engine(args: argparse.Namespace, setting: Setting, time: Time) -> tuple[Engine, Device]:
    costs = costs_of(setting.shape)
    if args.only_reads:
        costs = costs.only_reads()
    if args.fp8:
        costs = costs.in_fp8()
    dtype = "float8_e4m3fn" if args.fp8 else "bfloat16"
    page_bytes = PAGE_TOKENS * costs.kv_bytes
    num_pages = int(args.pool_gib * 2**30) // page_bytes
    largest = adapter_bytes(setting, 0, dtype)
    fixed = args.fixed_slots

    def num_bytes(digest: str) -> int:
        return largest if fixed else adapter_bytes(setting, int(digest), dtype)

    device = Device(time, costs)
    ready = Ready(
        base_id="",
        max_context=2048,
        vocab_size=SHAPES[setting.shape]["vocab_size"],
        num_pages=num_pages,
        page_tokens=PAGE_TOKENS,
        page_bytes=page_bytes,
        device="none",
        dtype="bfloat16",
        kernels={},
        engine_pid=os.getpid(),
    )
    policy = Policy(fairness=args.fairness, max_wait_s=args.max_wait, cluster=args.cluster)
    engine = Engine(
        ready,
        device,
        PagePool(num_pages),
        Limits(PAGE_TOKENS, args.max_sequences, args.max_batch_tokens, max_waiting=100_000),
        policy,
        Loaders(time, costs, num_bytes, page_bytes, args.loaders),
        num_slots=fixed or 1024,
        host_cache_bytes=1 << 50,
        slot_pages=-(-largest // page_bytes) if fixed else None,
        clock=time,
    )
    return engine, device


def simulate(args: argparse.Namespace, num_adapters: int) -> dict[str, object]:
    setting = SETTINGS[args.setting]
    time = Time()
    engine, device = make_engine(args, setting, time)
    workload = Workload(args.requests, num_adapters, rate=args.rate, cv=args.cv, lengths=setting.lengths)
    asks = asks_of(draw_trace(workload, args.seed), has_adapters=num_adapters > 0)
    if args.merged is not None:
        seen = drive_merged(engine, asks, args.merged or None, time)
    else:
        numbers = {ask.adapter for ask in asks if ask.adapter is not None}
        targets = {i: AdapterTarget(serving_digest=str(i), version_digest="", label=str(i)) for i in numbers}
        seen = drive_engine(engine, asks, targets, time)
    tokens = sum(ask.num_tokens for ask in asks)
    return {
        "bench": "simulate",
        "setting": args.setting,
        "adapters": num_adapters,
        "requests": args.requests,
        "pool_gib": args.pool_gib,
        "fixed_slots": args.fixed_slots,
        "merged": args.merged,
        "only_reads": args.only_reads,
        "fp8": args.fp8,
        "req_s": round(args.requests / device.free_s, 2),
        "full_batch_after_s": seen.full_batch_after_s,
        "rows_a_step": round(tokens / seen.counts["steps"], 1),
        **seen.counts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=[name for name in SETTINGS if name != "small"])
    parser.add_argument("adapters", type=int, nargs="+", help="how many, one line each")
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--pool-gib", type=float, default=62.0)
    parser.add_argument("--fixed-slots", type=int, help="as many, of the largest rank, set aside for good")
    parser.add_argument("--merged", type=int, metavar="TOKENS", help="turns of merged adapters; 0: in the best order")
    parser.add_argument("--fp8", action="store_true", help="adapters of a byte a number")
    parser.add_argument("--only-reads", action="store_true", help="an adapter costs its bytes once a step, no more")
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second; 0: all at once")
    parser.add_argument("--cv", type=float, default=1.0)
    parser.add_argument("--cluster", type=int)
    parser.add_argument("--fairness", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--max-wait", type=float, default=5.0)
    parser.add_argument("--max-sequences", type=int, default=256)
    parser.add_argument("--max-batch-tokens", type=int, default=2048)
    parser.add_argument("--loaders", type=int, default=8)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, help="append the JSON lines here")
    args = parser.parse_args()
    for num_adapters in args.adapters:
        row = simulate(args, num_adapters)
        print(encode_row(row), flush=True)
        if args.out:
            append_row(args.out, row)


if __name__ == "__main__":
    main()
