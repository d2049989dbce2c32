"""Serving, measured over HTTP: Flora's own server, or any other that speaks OpenAI's API."""

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flora.bench.asks import Ask
from flora.bench.engines import World, make_world
from flora.bench.facts import Surroundings, engine_facts, make_row, workload_facts
from flora.bench.http_stream import Endpoint
from flora.bench.over_http import drive_server, get_json, get_metrics, run
from flora.bench.own_server import running_server
from flora.bench.row import Row
from flora.bench.settings import ServeBench
from flora.bench.shapes import write_tokenizer
from flora.bench.storm import Storm, StormRow, storm_row
from flora.bench.storm_http import drive_storm_http
from flora.bench.summary import summarize
from flora.bench.timeline import Timeline, check_timelines
from flora.bench.workload import all_numbers, asks_for, trace_of, wanted_numbers, warm_up_asks
from flora.errors import CheckFailed, RemoteError
from flora.serve import ServeConfig

Tell = Callable[[str], None]
Metrics = Mapping[str, list[tuple[dict[str, str], float]]]

_LOOK_S = 0.2  # between two looks at a server's metrics
_ENDLESS = 1 << 20  # tokens
_SETTLE_S = 30.0  # for a server to hear of clients that are gone
_COUNTERS = {  # column of a row -> Flora's metric, the difference of which it is
    "steps": "flora:engine_steps_total",
    "loads": "flora:adapter_loads_total",
    "evictions": "flora:adapter_evictions_total",
    "preemptions": "vllm:num_preemptions_total",
}


@dataclass(frozen=True, slots=True)
class Clients:
    """Who asks, and how."""

    most: int | None = None  # at once; None: all that are due
    ignore_eos: bool = True

    def are_closed_loop(self, bench: ServeBench) -> bool:
        """Whether requests wait for a client, so that their time begins when one sends them."""
        return self.most is not None and bench.rate == 0


def measure_own_server(
    bench: ServeBench,
    clients: Clients,
    where: Surroundings,
    *,
    scratch: Path | None = None,
    tell: Tell = lambda text: None,
) -> Iterator[Row]:
    """As serving.measure_engine, each engine behind a `flora serve` of its own, on this machine.

    Raises CheckFailed also where the idle server still holds pages of keys and values.
    """
    with tempfile.TemporaryDirectory(prefix="flora-bench-", dir=scratch) as place:
        folder = Path(place)
        started = time.perf_counter()
        world = make_world(folder, bench, all_numbers(bench))
        write_tokenizer(folder / "base", bench.setting.shape)
        tell(f"{len(world.targets)} adapters registered in {time.perf_counter() - started:.1f} s")
        for num_adapters in bench.setting.adapters:
            yield from _measure_own(world, num_adapters, clients, where, tell)


def measure_url(
    bench: ServeBench,
    endpoint: Endpoint,
    clients: Clients,
    where: Surroundings,
    *,
    adapter_name: str,
    base_name: str | None = None,
    system: str | None = None,
) -> Iterator[Row]:
    """The same traces for a server that runs already, with adapters of its own.

    adapter_name  the server's name of adapter number i, with {} for i
    base_name     its name of the base; None: of the first model that it lists
    system        what the rows call it; None: what it calls itself
    """
    cards = run(get_json(endpoint, "/v1/models"))["data"]
    base = base_name or cards[0]["id"]
    facts = {
        "system": system or f"{cards[0].get('owned_by') or 'server'}-http",
        "version": run(_version(endpoint)),
        "commit": where.commit,
        "gpu": where.gpu,
        "device": None,
        "torch": None,
        "triton": None,
        "order": "unknown",
    }

    def model_of(adapter: int | None) -> str:
        return base if adapter is None else adapter_name.replace("{}", str(adapter))

    for num_adapters in bench.setting.adapters:
        warm_up = [
            ask if ask.adapter is None else replace(ask, adapter=ask.adapter % num_adapters)
            for ask in warm_up_asks(bench, num_adapters)
        ]
        _pass(endpoint, warm_up, model_of, clients)
        yield from _passes(bench, num_adapters, endpoint, model_of, clients, facts)


def measure_storm_http(
    bench: ServeBench,
    storm: Storm,
    where: Surroundings,
    *,
    scratch: Path | None = None,
    tell: Tell = lambda text: None,
) -> Iterator[StormRow]:
    """As serving.measure_storm, through a server of its own: what its clients feel."""
    with tempfile.TemporaryDirectory(prefix="flora-bench-", dir=scratch) as place:
        folder, most, base = Path(place), max(bench.setting.adapters), bench.setting.shape
        world = make_world(folder, bench, range(most + storm.num_loads))
        write_tokenizer(folder / "base", base)
        newcomers = [world.targets[most + k].label for k in range(storm.num_loads)]
        for num_adapters in bench.setting.adapters:
            engine = world.config([*range(num_adapters), *range(most, most + storm.num_loads)])
            streams = [world.targets[i].label for i in range(num_adapters)] or [base]
            with running_server(ServeConfig(engine=engine, base_name=base, port=0), folder / "server.log") as url:
                tell(f"{num_adapters} adapters: server up")
                endpoint = Endpoint(url)
                before = run(_settled(endpoint))
                max_tokens = engine.max_context or _ENDLESS  # the engine ends where the context does
                weather = run(drive_storm_http(endpoint, storm, streams, newcomers, max_tokens=max_tokens))
                after = run(_settled(endpoint))
                if _kv_pages(after) != 0:
                    raise CheckFailed(f"the idle server holds {_kv_pages(after)} pages of keys and values")
                counts = _counts(before, after)
                kept = {name: counts[name] for name in ("evictions", "preemptions")}
                yield storm_row(bench, storm, weather, where, engine, _kernels(after), kept, system="flora-http")


def _measure_own(world: World, num_adapters: int, clients: Clients, where: Surroundings, tell: Tell) -> Iterator[Row]:
    bench = world.bench
    engine = world.config(wanted_numbers(bench, num_adapters))
    name = bench.setting.shape

    def model_of(adapter: int | None) -> str:
        return name if adapter is None else world.targets[adapter].label

    started = time.perf_counter()
    with running_server(ServeConfig(engine=engine, base_name=name, port=0), world.folder / "server.log") as url:
        start_s = round(time.perf_counter() - started, 1)
        tell(f"{num_adapters} adapters: server up in {start_s} s")
        endpoint = Endpoint(url)
        _pass(endpoint, warm_up_asks(bench, num_adapters), model_of, clients)
        facts = engine_facts(engine) | {
            "system": "flora-http",
            "commit": where.commit,
            "gpu": where.gpu,
            "start_s": start_s,
        }
        for row in _passes(bench, num_adapters, endpoint, model_of, clients, facts):
            if row.kv_pages_left != 0:
                raise CheckFailed(f"the idle server holds {row.kv_pages_left} pages of keys and values")
            yield row


def _passes(
    bench: ServeBench,
    num_adapters: int,
    endpoint: Endpoint,
    model_of: Callable[[int | None], str],
    clients: Clients,
    facts: dict[str, Any],
) -> Iterator[Row]:
    for order, seed in enumerate(bench.seeds):
        trace = trace_of(bench, num_adapters, seed)
        asks = asks_for(bench, trace, num_adapters, seed)
        before = run(_settled(endpoint))
        timelines = _pass(endpoint, asks, model_of, clients)
        after = run(_settled(endpoint))
        yield make_row(
            **{"order": "warm" if order else "cold"} | facts,
            clients=clients.most,
            kernels=_kernels(after) or None,
            kv_pages_left=_kv_pages(after),
            **_counts(before, after),
            **workload_facts(bench, trace, num_adapters, seed),
            **summarize(asks, timelines, bench.slo_ttft_s, closed_loop=clients.are_closed_loop(bench)),
        )


def _pass(
    endpoint: Endpoint, asks: list[Ask], model_of: Callable[[int | None], str], clients: Clients
) -> list[Timeline]:
    timelines = run(drive_server(endpoint, asks, model_of, clients=clients.most, ignore_eos=clients.ignore_eos))
    check_timelines(asks, timelines, may_abort=True, may_stop=not clients.ignore_eos)
    return timelines


async def _settled(endpoint: Endpoint) -> Metrics:
    """The metrics once nothing runs or waits, of a later moment than now; a server without any settles at once."""
    deadline_s = time.monotonic() + _SETTLE_S
    first = await get_metrics(endpoint)
    while time.monotonic() < deadline_s:
        now = await get_metrics(endpoint)
        if not _sum(now, "vllm:num_requests_running") + _sum(now, "vllm:num_requests_waiting"):
            # Flora's are the engine's last heartbeat: the second after this moment has seen all that happened before
            beats = "flora:engine_heartbeats_total"
            if beats not in now or _sum(now, beats) >= _sum(first, beats) + 2:
                return now
        await asyncio.sleep(_LOOK_S)
    raise CheckFailed(f"{endpoint.url} still works on requests {_SETTLE_S:.0f} s after the last has ended")


def _kernels(metrics: Metrics) -> dict[str, str]:
    return {labels["op"]: labels["implementation"] for labels, _ in metrics.get("flora:kernel_info", [])}


def _kv_pages(metrics: Metrics) -> int | None:
    """Pages of keys and values that are held for requests, on a Flora server."""
    pages = {labels["use"]: int(value) for labels, value in metrics.get("flora:pages", [])}
    return pages["kv"] if pages else None  # those that only the prefix cache keeps are a use of their own


def _counts(before: Metrics, after: Metrics) -> dict[str, int]:
    return {column: int(_sum(after, name) - _sum(before, name)) for column, name in _COUNTERS.items() if name in after}


def _sum(metrics: Metrics, name: str) -> float:
    return sum(value for _, value in metrics.get(name, []))


async def _version(endpoint: Endpoint) -> str | None:
    try:
        answer = await get_json(endpoint, "/version")
    except RemoteError:
        return None
    return answer.get("version") if isinstance(answer, dict) else None
