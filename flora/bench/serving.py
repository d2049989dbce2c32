"""Serving, measured in this process: for each number of adapters a new engine, for each seed a pass over it."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from flora.bench.bed import Bed
from flora.bench.engines import World, make_world, running_engine
from flora.bench.facts import Surroundings, engine_facts, make_row, workload_facts
from flora.bench.in_process import drive_engine
from flora.bench.merged import drive_merged
from flora.bench.row import Row
from flora.bench.settings import ServeBench
from flora.bench.storm import Storm, StormRow, drive_storm, storm_row
from flora.bench.summary import summarize
from flora.bench.timeline import check_timelines
from flora.bench.workload import all_numbers, asks_for, trace_of, wanted_numbers, warm_up_asks
from flora.errors import CheckFailed
from flora.serve.config import EngineConfig
from flora.serve.engine import Engine
from flora.serve.messages import LoadAdapter, Rejected
from flora.serve.request import AdapterTarget

Tell = Callable[[str], None]


def measure_engine(
    bench: ServeBench, where: Surroundings, *, scratch: Path | None = None, tell: Tell = lambda text: None
) -> Iterator[Row]:
    """A row for each number of adapters and seed, its counts checked.

    scratch  where config, registry and adapters lie meanwhile; None: the system's own place
    tell     is told what takes long
    Raises CheckFailed where a request did not get the tokens of its trace, and where an idle engine holds pages.
    """
    with tempfile.TemporaryDirectory(prefix="flora-bench-", dir=scratch) as folder:
        started = time.perf_counter()
        world = make_world(Path(folder), bench, all_numbers(bench))
        tell(f"{len(world.targets)} adapters registered in {time.perf_counter() - started:.1f} s")
        with Bed(config_for(world, num_adapters) for num_adapters in bench.setting.adapters) as bed:
            tell(f"engine built in {bed.start_s} s: {bed.stages}")
            for num_adapters in bench.setting.adapters:
                yield from measure_on(bed, world, num_adapters, where)


def config_for(world: World, num_adapters: int) -> EngineConfig:
    """Of the engine that serves the world's trace over this many adapters."""
    return world.config(wanted_numbers(world.bench, num_adapters))


def measure_on(
    bed: Bed, world: World, num_adapters: int, where: Surroundings, *, label: str | None = None
) -> Iterator[Row]:
    """A row for each seed, all on one new engine. Raises what measure_engine raises."""
    bench = world.bench
    engine, config = bed.engine(config_for(world, num_adapters))
    warm_up, may_abort = warm_up_asks(bench, num_adapters), config.slo_ttft_s is not None
    check_timelines(warm_up, drive_engine(engine, warm_up, world.targets).timelines, may_abort=may_abort)
    load_adapters(engine, [world.targets[i] for i in range(bench.beside)])
    for order, seed in enumerate(bench.seeds):
        trace = trace_of(bench, num_adapters, seed)
        asks = asks_for(bench, trace, num_adapters, seed)
        if bench.merged:
            seen = drive_merged(engine, asks, bench.merged_turn_tokens)
        else:
            seen = drive_engine(engine, asks, world.targets)
        check_timelines(asks, seen.timelines, may_abort=may_abort)
        yield make_row(
            system="flora",
            label=label,
            commit=where.commit,
            gpu=where.gpu,
            kernels=engine.ready.kernels,
            order="cold" if order == 0 else "warm",
            start_s=bed.start_s,
            kv_pages_left=check_nothing_leaks(engine),
            full_batch_after_s=seen.full_batch_after_s,
            step_ms_p50=seen.step_ms_p50,
            **workload_facts(bench, trace, num_adapters, seed),
            **engine_facts(config),
            **seen.counts,
            **summarize(asks, seen.timelines, bench.slo_ttft_s),
        )


def load_adapters(engine: Engine, targets: Sequence[AdapterTarget]) -> None:
    """Makes adapters resident that nobody asks for. Raises CheckFailed where one is refused."""
    for target in targets:
        engine.load_adapter(LoadAdapter(request_id=target.label, adapter=target))
    while not engine.is_idle:
        for _, message in engine.step(wait_s=1.0):
            if isinstance(message, Rejected):
                raise CheckFailed(f"the engine refused {message.request_id}: {message.message}")


def check_nothing_leaks(engine: Engine) -> int:
    """The KV pages that an idle engine holds for requests: none. Raises CheckFailed, also where pages are lost."""
    pages, beat = engine.pages, engine.heartbeat()
    left = beat.kv_pages - beat.prefix_pages
    adapters = engine.residency.num_pages
    if left or beat.free_pages + beat.prefix_pages + adapters != pages.num_usable:
        raise CheckFailed(
            f"the engine is idle and holds {left} pages of keys and values",
            cause=f"{pages.num_usable} pages, {beat.free_pages} free, {adapters} of adapters",
        )
    return left


def measure_storm(
    bench: ServeBench,
    storm: Storm,
    where: Surroundings,
    *,
    scratch: Path | None = None,
    tell: Tell = lambda text: None,
) -> Iterator[StormRow]:
    """A row for each number of adapters that the streams use; those that are loaded come on top.

    Raises CheckFailed where a load is refused, a stream ends early, or the idle engine holds pages.
    """
    with tempfile.TemporaryDirectory(prefix="flora-bench-", dir=scratch) as folder:
        most = max(bench.setting.adapters)
        newcomers = range(most, most + storm.num_loads)
        world = make_world(Path(folder), bench, range(most + storm.num_loads))
        tell(f"{len(world.targets)} adapters registered")
        for num_adapters in bench.setting.adapters:
            yield _measure_storm(world, storm, num_adapters, newcomers, where)


def _measure_storm(
    world: World, storm: Storm, num_adapters: int, newcomers: Sequence[int], where: Surroundings
) -> StormRow:
    config = world.config([*range(num_adapters), *newcomers])
    with running_engine(config) as engine:
        streams = [world.targets[i] for i in range(num_adapters)]
        before = engine.heartbeat()
        weather = drive_storm(engine, storm, streams, [world.targets[i] for i in newcomers])
        after = engine.heartbeat()
        check_nothing_leaks(engine)
        counts = {
            "evictions": after.adapter_evictions - before.adapter_evictions,
            "preemptions": after.preemptions - before.preemptions,
        }
        return storm_row(world.bench, storm, weather, where, config, engine.ready.kernels, counts)
