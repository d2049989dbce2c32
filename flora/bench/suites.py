"""The measurements that Flora's claims rest on, by label, each list in the order of its worth.

S-LoRA's are its tables 3 and 4 and figures 9 to 12 (arXiv:2311.03285), with all requests there at once where the
paper's ten requests a second would leave this GPU idle.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from flora.bench.settings import SETTINGS, ServeBench
from flora.bench.storm import Storm
from flora.serve.config import EngineConfig

HTTP_CLIENTS = 256
_CAPPED_BYTES = 14_500 << 19  # S-LoRA's A10G: 14,500 cells of one token of its 7B shape, 512 KiB each
_QUEUE_TOKENS = 20_480  # S-LoRA's batch_max_tokens: a sixth of the tokens that the roomy pool holds
_CAPPED_QUEUE_TOKENS = 2_416  # a sixth of its A10G's, with which its figure 9 was taken
_ROOMY_BYTES = 62 << 30  # beside 13.5 GB of weights and the step's graphs: what a GPU of 80 GB has room for
_STORM_CONTEXT = 8192  # streams must not end before the storm does


@dataclass(frozen=True, slots=True)
class Load:
    """Arrivals at a rate that depends on another measurement."""

    label: str  # of that measurement
    share: float  # of its requests a second
    duration_s: float


@dataclass(frozen=True, slots=True)
class Entry:
    """One measurement: one number of adapters, one pass for each seed."""

    label: str  # what its rows are called, for good
    bench: ServeBench  # its rate and number of requests are those of `load`, where there is one
    seconds: float  # that it takes on an H100 once an engine is there
    load: Load | None = None
    num_clients: int | None = None  # over HTTP, against a server of its own
    storm: Storm | None = None

    @property
    def num_adapters(self) -> int:
        return self.bench.setting.adapters[0]


@dataclass(frozen=True, slots=True)
class Scale:
    """How large things are: as the claims say, or so small that a CPU runs all of it in a minute."""

    is_small: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)  # of every setting
    counts: Mapping[int, int] = field(default_factory=dict)  # adapters or slots -> how many instead

    def count(self, number: int) -> int:
        return self.counts.get(number, number)


_FEW = {5: 2, 8: 1, 16: 2, 20: 2, 24: 3, 32: 3, 100: 3, 128: 3, 144: 2, 160: 2, 176: 3, 192: 3, 200: 4, 500: 4,
        1000: 4, 2000: 5}  # fmt: skip
FULL = Scale()
SMALL = Scale(
    is_small=True,
    changes={"shape": "tiny", "num_requests": 8, "lengths": (4, 9)},
    counts=_FEW,
)


class _Maker:
    """Entries of one scale over one engine's configuration."""

    def __init__(self, engine: EngineConfig, scale: Scale) -> None:
        self.engine = engine
        self.scale = scale

    def __call__(
        self,
        label: str,
        preset: str,
        num_adapters: int,
        seconds: float,
        *,
        setting: Mapping[str, Any] | None = None,
        engine: Mapping[str, Any] | None = None,
        load: Load | None = None,
        num_clients: int | None = None,
        storm: Storm | None = None,
        **bench: Any,
    ) -> Entry:
        """setting, engine, bench  what differs from the preset, from the engine's configuration, from a plain pass"""
        scale, changes = self.scale, dict(engine or {})
        made = replace(SETTINGS[preset], adapters=(scale.count(num_adapters),), **{**(setting or {}), **scale.changes})
        if made.fixed_slots is not None:
            made = replace(made, fixed_slots=scale.count(made.fixed_slots))
        if scale.is_small:
            made = replace(made, ranks=tuple(max(1, rank // 8) for rank in made.ranks))
            label = _rehearsed(label)
            load = load and replace(load, label=_rehearsed(load.label), duration_s=load.duration_s / 200)
            storm = storm and Storm(rate=10.0, num_streams=2, window_s=0.5)
            num_clients = num_clients and 4
            changes = {name: value for name, value in changes.items() if name != "pool_bytes"}
        if "beside" in bench:
            bench["beside"] = scale.count(bench["beside"])
        config = msgspec.structs.replace(self.engine, **changes)
        plain = ServeBench(setting=made, engine=config, **bench)
        return Entry(label, plain, seconds, load, num_clients, storm)


def _rehearsed(label: str) -> str:
    """What is so small proves no claim."""
    return f"small/{label}"


def _table(make: _Maker) -> Iterator[Entry]:
    for num_adapters, seconds in ((0, 17), (5, 19), (100, 20), (1000, 21), (2000, 23)):
        yield make(f"table/{num_adapters}", "G1", num_adapters, seconds)


def _linear(make: _Maker) -> Iterator[Entry]:
    for num_adapters, seconds in ((100, 28), (1000, 40)):
        yield make(f"linear/{num_adapters}", "G1", num_adapters, seconds, setting={"modules": "all"})


def _base(make: _Maker) -> Iterator[Entry]:
    """Five passes each: what is looked for is less than a hundredth."""
    short = {"num_requests": 256, "lengths": (64, 192)}
    for label, beside in (("base/alone", 0), ("base/beside", 100)):
        yield make(label, "G1", 0, 20, setting=short, seeds=(42,) * 5, beside=beside)


def _leak(make: _Maker) -> Iterator[Entry]:
    many = {"num_requests": 10_000, "lengths": (4, 64)}
    yield make("leak", "G1", 500, 60, setting=many, engine={"max_waiting": 10_000}, cancel=0.05)


def _http(make: _Maker) -> Iterator[Entry]:
    yield make("http/100", "G1", 100, 25, num_clients=HTTP_CLIENTS)


def _storm(make: _Maker) -> Iterator[Entry]:
    storm = Storm(rate=50.0, num_streams=64, window_s=5.0)
    yield make("storm/50", "G1", 16, 30, storm=storm, engine={"max_context": _STORM_CONTEXT})


def _drawn(make: _Maker) -> Iterator[Entry]:
    """As chats are asked for: no request is greedy."""
    for num_adapters, seconds in ((0, 18), (100, 21)):
        yield make(f"drawn/{num_adapters}", "G1", num_adapters, seconds, temperature=0.8, top_p=0.95)


def _invariant(make: _Maker) -> Iterator[Entry]:
    for num_adapters in (0, 100):
        yield make(f"invariant/{num_adapters}", "G1", num_adapters, 30, engine={"batch_invariant": True})


def _after(make: _Maker) -> Iterator[Entry]:
    """LoRA after the base's products, on the same stream, in steps of every size: to be held against the table."""
    for num_adapters in (5, 1000):
        yield make(f"after/{num_adapters}", "G1", num_adapters, 21, engine={"beside_rows": 0})


def _fp8(make: _Maker) -> Iterator[Entry]:
    """Adapters in fp8: the table, all seven projections and S-LoRA's shapes, to be held against the same in bf16."""
    narrow = {"adapter_dtype": "float8_e4m3fn"}
    for num_adapters, seconds in ((5, 19), (100, 20), (1000, 21), (2000, 22)):
        yield make(f"table/{num_adapters}/fp8", "G1", num_adapters, seconds, engine=narrow)
    for num_adapters, seconds in ((100, 28), (1000, 36)):
        yield make(f"linear/{num_adapters}/fp8", "G1", num_adapters, seconds, setting={"modules": "all"}, engine=narrow)
    for preset, number, seconds in (("S2", 5, 35), ("S2", 2000, 38), ("S1", 5, 30), ("S1", 2000, 32)):
        roomy = narrow | {"pool_bytes": _ROOMY_BYTES}
        yield make(f"{preset}/{number}/fp8", preset, number, seconds, engine=roomy)
    capped = narrow | {"pool_bytes": _CAPPED_BYTES}
    yield make("S2/200/capped/fp8", "S2", 200, 40, setting={"num_requests": 400}, engine=capped)


def _paper(make: _Maker) -> Iterator[Entry]:
    """S-LoRA's own shapes."""
    roomy, capped = {"pool_bytes": _ROOMY_BYTES}, {"pool_bytes": _CAPPED_BYTES}
    few = {"num_requests": 400}
    drawn = (42, 43, 44)  # what slots lose is a few requests' places, so one draw of them says little
    for preset, number, seconds in (("S2", 5, 35), ("S2", 2000, 40), ("S1", 5, 30), ("S1", 2000, 33)):
        yield make(f"{preset}/{number}", preset, number, seconds, engine=roomy)
    yield make("S2/2000/cluster-100", "S2", 2000, 40, engine=roomy | {"cluster": 100})
    for slots in (160, 176, 192):
        yield make(f"S2/2000/fixed-{slots}", "S2", 2000, 45, setting={"fixed_slots": slots}, engine=roomy)
    yield make("S2/5/merged", "S2", 5, 35, merged=True, engine=roomy)
    yield make("S2/5/merged/queue", "S2", 5, 60, merged=True, merged_turn_tokens=_QUEUE_TOKENS, engine=roomy)
    yield from _figure_9(make)
    yield make("S2/200", "S2", 200, 90, engine=roomy, seeds=drawn)
    yield make("S2/200/fixed-144", "S2", 200, 105, setting={"fixed_slots": 144}, engine=roomy, seeds=drawn)
    yield from _early_abort(make, 1.0)
    yield make("S2/200/capped", "S2", 200, 45, setting=few, engine=capped)
    for slots in (20, 24):  # the best, as those above, by benchmarks/simulate.py: more leave too little for KV
        yield make(f"S2/200/capped/fixed-{slots}", "S2", 200, 60, setting=few | {"fixed_slots": slots}, engine=capped)
    yield make("S2/100", "S2", 100, 35, engine=roomy)
    for name, cluster in (("any", None), ("cluster-8", 8), ("cluster-2", 2)):
        switches = capped | {"cluster": cluster, "fairness": False}
        yield make(f"S2/32/{name}", "S2", 32, 20, setting={"num_requests": 150}, engine=switches)
    calm = Load("S2/2000", share=0.75, duration_s=20.0)
    for name, prefetch in (("prefetch", True), ("no-prefetch", False)):
        yield make(f"S2/2000/{name}", "S2", 2000, 28, load=calm, engine=roomy | {"prefetch": prefetch})
    yield make("S2/200/fixed-128", "S2", 200, 105, setting={"fixed_slots": 128}, engine=roomy, seeds=drawn)
    yield from _early_abort(make, 4.0)
    for slots in (32, 16):  # what somebody would take who has not tried them all
        yield make(f"S2/200/capped/fixed-{slots}", "S2", 200, 70, setting=few | {"fixed_slots": slots}, engine=capped)


def _figure_9(make: _Maker) -> Iterator[Entry]:
    """On the fly and merged in the pool that S-LoRA took its figure 9 in, by the queue that it has there."""
    some, capped = {"num_requests": 150}, {"pool_bytes": _CAPPED_BYTES}
    yield make("S2/5/capped", "S2", 5, 18, setting=some, engine=capped)
    yield make("S2/5/capped/merged/queue", "S2", 5, 35, setting=some, engine=capped, merged=True,
               merged_turn_tokens=_CAPPED_QUEUE_TOKENS)  # fmt: skip


def _early_abort(make: _Maker, cv: float) -> Iterator[Entry]:
    """More than can be served: who comes first, or who can still be in time. It takes the batch a while to be full."""
    overload = Load("S2/200", share=1.3, duration_s=75.0)
    for name, slo_s in (("fcfs", None), ("abort", 2.0)):
        switches = {"slo_ttft_s": slo_s, "fairness": False, "pool_bytes": _ROOMY_BYTES}
        label = f"S2/200/{name}/cv{cv:g}"
        yield make(label, "S2", 200, 95, load=overload, engine=switches, slo_ttft_s=2.0, cv=cv)


SUITES: Mapping[str, Callable[[_Maker], Iterator[Entry]]] = {
    "table": _table,
    "linear": _linear,
    "base": _base,
    "storm": _storm,
    "http": _http,
    "drawn": _drawn,
    "invariant": _invariant,
    "after": _after,
    "fp8": _fp8,
    "paper": _paper,
    "leak": _leak,
}


def entries_of(names: list[str], engine: EngineConfig, scale: Scale = FULL) -> list[Entry]:
    """The entries of these suites, in order, over an engine of this configuration."""
    make = _Maker(engine, scale)
    return [entry for name in names for entry in SUITES[name](make)]
