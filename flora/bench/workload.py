"""The traces that a benchmark asks for, and which adapters they want."""

from flora.bench.asks import Ask, asks_of
from flora.bench.settings import WARM_UP_ADAPTERS, WARM_UP_REQUESTS, WARM_UP_SEED, ServeBench
from flora.bench.trace import Trace, Workload, draw_trace


def trace_of(bench: ServeBench, num_adapters: int, seed: int) -> Trace:
    setting = bench.setting
    return draw_trace(
        Workload(setting.num_requests, num_adapters, bench.alpha, bench.rate, bench.cv, setting.lengths), seed
    )


def asks_for(bench: ServeBench, trace: Trace, num_adapters: int, seed: int) -> list[Ask]:
    return asks_of(
        trace,
        has_adapters=num_adapters > 0,
        cancel=bench.cancel,
        seed=seed,
        temperature=bench.temperature,
        top_p=bench.top_p,
    )


def warm_up_asks(bench: ServeBench, num_adapters: int) -> list[Ask]:
    """Requests before the clock starts, for adapters beyond all that are measured: those stay cold."""
    trace = draw_trace(
        Workload(min(WARM_UP_REQUESTS, bench.setting.num_requests), WARM_UP_ADAPTERS, lengths=bench.setting.lengths),
        WARM_UP_SEED,
    )
    return asks_of(trace, has_adapters=num_adapters > 0, offset=max(bench.setting.adapters))


def wanted_numbers(bench: ServeBench, num_adapters: int) -> set[int]:
    """The adapters that any pass over this many asks for, the warm-up's and those beside it among them."""
    wanted = set(range(bench.beside))
    if num_adapters:
        wanted |= {int(i) for seed in bench.seeds for i in trace_of(bench, num_adapters, seed).adapters}
        wanted |= {ask.adapter for ask in warm_up_asks(bench, num_adapters) if ask.adapter is not None}
    return wanted


def all_numbers(bench: ServeBench) -> set[int]:
    return set().union(*(wanted_numbers(bench, n) for n in bench.setting.adapters))
