"""Serving, measured: for each number of adapters an engine is built, warmed up and given the traces of all seeds."""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

import flora
from flora.bench.asks import Ask, asks_of
from flora.bench.engines import World, make_world, running_engine
from flora.bench.in_process import Pass, drive_engine
from flora.bench.row import Row
from flora.bench.settings import WARM_UP_ADAPTERS, WARM_UP_REQUESTS, WARM_UP_SEED, ServeBench
from flora.bench.summary import summarize
from flora.bench.timeline import check_timelines
from flora.bench.trace import Trace, Workload, draw_trace
from flora.errors import CheckFailed
from flora.serve.config import EngineConfig
from flora.serve.engine import Engine
from flora.serve.engine.pages import Use

Tell = Callable[[str], None]

_SIZES = {  # fields of EngineConfig that have columns of their own, or say where things lie
    "base", "registry", "cache_dir", "device", "dtype", "pool_bytes", "max_sequences", "max_batch_tokens",
    "host_cache_bytes", "dummy_weights", "max_waiting", "poison"
}  # fmt: skip


def measure_engine(
    bench: ServeBench, *, commit: str | None, scratch: Path | None = None, tell: Tell = lambda text: None
) -> Iterator[Row]:
    """A row for each number of adapters and seed, the engine driven in this process, its counts checked.

    commit   of the code that runs
    scratch  where config, registry and adapters lie meanwhile; None: the system's own place
    tell     is told what takes long
    Raises CheckFailed where a request did not get the tokens of its trace.
    """
    with tempfile.TemporaryDirectory(prefix="flora-bench-", dir=scratch) as folder:
        started = time.perf_counter()
        world = make_world(Path(folder), bench, all_numbers(bench))
        tell(f"{len(world.targets)} adapters registered in {time.perf_counter() - started:.1f} s")
        for num_adapters in bench.setting.adapters:
            yield from _measure(world, num_adapters, commit, tell)


def trace_of(bench: ServeBench, num_adapters: int, seed: int) -> Trace:
    setting = bench.setting
    return draw_trace(
        Workload(setting.num_requests, num_adapters, bench.alpha, bench.rate, bench.cv, setting.lengths), seed
    )


def asks_for(bench: ServeBench, trace: Trace, num_adapters: int, seed: int) -> list[Ask]:
    return asks_of(trace, has_adapters=num_adapters > 0, cancel=bench.cancel, seed=seed)


def warm_up_asks(bench: ServeBench, num_adapters: int) -> list[Ask]:
    """Requests before the clock starts, for adapters beyond all that are measured: those stay cold."""
    trace = draw_trace(
        Workload(min(WARM_UP_REQUESTS, bench.setting.num_requests), WARM_UP_ADAPTERS, lengths=bench.setting.lengths),
        WARM_UP_SEED,
    )
    return asks_of(trace, has_adapters=num_adapters > 0, offset=max(bench.setting.adapters))


def wanted_numbers(bench: ServeBench, num_adapters: int) -> set[int]:
    """The adapters that any pass over this many asks for, the warm-up's among them."""
    if num_adapters == 0:
        return set()
    wanted = {int(i) for seed in bench.seeds for i in trace_of(bench, num_adapters, seed).adapters}
    return wanted | {ask.adapter for ask in warm_up_asks(bench, num_adapters) if ask.adapter is not None}


def all_numbers(bench: ServeBench) -> set[int]:
    return set().union(*(wanted_numbers(bench, n) for n in bench.setting.adapters))


def _measure(world: World, num_adapters: int, commit: str | None, tell: Tell) -> Iterator[Row]:
    bench = world.bench
    config = world.config(wanted_numbers(bench, num_adapters))
    started = time.perf_counter()
    with running_engine(config) as engine:
        start_s = time.perf_counter() - started
        tell(f"{num_adapters} adapters: engine built in {start_s:.1f} s")
        warm_up = warm_up_asks(bench, num_adapters)
        check_timelines(warm_up, drive_engine(engine, warm_up, world.targets).timelines)
        for order, seed in enumerate(bench.seeds):
            trace = trace_of(bench, num_adapters, seed)
            asks = asks_for(bench, trace, num_adapters, seed)
            seen = drive_engine(engine, asks, world.targets)
            check_timelines(asks, seen.timelines)
            yield make_row(
                commit=commit,
                order="cold" if order == 0 else "warm",
                start_s=round(start_s, 1),
                kv_pages_left=check_nothing_leaks(engine),
                **workload_facts(bench, trace, num_adapters, seed),
                **engine_facts(engine, config),
                **pass_facts(seen),
                **summarize(asks, seen.timelines, bench.slo_ttft_s),
            )


def check_nothing_leaks(engine: Engine) -> int:
    """The KV pages that an idle engine holds: none. Raises CheckFailed, also where pages are lost altogether."""
    pages = engine.pages
    left = pages.count(Use.KV)
    resident = sum(len(adapter.pages) for adapter in engine.residency)
    if left or pages.num_free + resident != pages.num_usable:
        raise CheckFailed(
            f"the engine is idle and holds {left} pages of keys and values",
            cause=f"{pages.num_usable} pages, {pages.num_free} free, {resident} of resident adapters",
        )
    return left


def make_row(**facts: Any) -> Row:
    """The row of these facts. A fact that no row has, or of another type, is a bug of ours."""
    return msgspec.convert(facts, Row, strict=True)


def workload_facts(bench: ServeBench, trace: Trace, num_adapters: int, seed: int) -> dict[str, Any]:
    setting = bench.setting
    return {
        "shape": setting.shape,
        "modules": setting.modules,
        "adapters": num_adapters,
        "distinct": trace.num_distinct if num_adapters else 0,
        "ranks": list(setting.ranks),
        "requests": trace.num_requests,
        "lengths": list(setting.lengths),
        "rate": bench.rate,
        "alpha": bench.alpha,
        "cv": bench.cv,
        "seed": seed,
    }


def engine_facts(engine: Engine, config: EngineConfig) -> dict[str, Any]:
    """What ran, and where."""
    import torch

    is_gpu = engine.ready.device.startswith("cuda")
    return {
        "system": "flora",
        "version": flora.__version__,
        "gpu": torch.cuda.get_device_name(engine.ready.device) if is_gpu else None,
        "device": engine.ready.device,
        "torch": str(torch.__version__),
        "triton": _version_of_triton() if is_gpu else None,
        "kernels": engine.ready.kernels,
        "max_batch_tokens": config.max_batch_tokens,
        "max_sequences": config.max_sequences,
        "pool_gib": round(engine.ready.num_pages * engine.ready.page_bytes / 2**30, 1),
        "host_gib": round(config.host_cache_bytes / 2**30, 1),
        "switches": {name: getattr(config, name) for name in config.__struct_fields__ if name not in _SIZES},
    }


def pass_facts(seen: Pass) -> dict[str, Any]:
    return {"full_batch_after_s": seen.full_batch_after_s, "step_ms_p50": seen.step_ms_p50, **seen.counts}


def _version_of_triton() -> str:
    import triton

    return str(triton.__version__)
