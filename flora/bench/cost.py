"""What k fine-tunes of one base cost to serve: as full checkpoints that take turns on the device, or as adapters of it.

The turns are as good as a server of full checkpoints can have them: who has waited longest names the next, all of his
requests that are there are served in one batch, and a checkpoint comes from page-locked memory by one copy a tensor.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from flora.bench.asks import Ask
from flora.bench.bed import Bed
from flora.bench.clock import Clock, WallClock
from flora.bench.engines import adapter_bytes, adapter_dtype, make_world
from flora.bench.facts import Surroundings, engine_facts
from flora.bench.in_process import Pass, drive_engine
from flora.bench.serving import Tell, check_nothing_leaks, config_for
from flora.bench.settings import ServeBench
from flora.bench.summary import summarize
from flora.bench.timeline import Timeline, check_timelines
from flora.bench.workload import all_numbers, asks_for, trace_of, warm_up_asks
from flora.serve.config import EngineConfig
from flora.serve.engine import Engine

_M = 1_000_000


class CostRow(msgspec.Struct, frozen=True, kw_only=True):
    """One way to serve one number of fine-tunes."""

    label: str
    system: str
    version: str | None
    commit: str | None
    gpu: str | None
    device: str | None
    torch: str | None
    triton: str | None
    kernels: dict[str, str]
    way: str  # checkpoints or adapters
    shape: str
    modules: str
    fine_tunes: int
    ranks: list[int]
    requests: int
    lengths: list[int]
    rate: float
    alpha: float
    cv: float
    seed: int
    in_tok: int
    out_tok: int
    elapsed_s: float
    req_s: float
    out_tok_s: float
    gpu_s_per_m_tok: float  # seconds of the device for a million tokens that were generated
    ttft_ms_p50: float | None
    ttft_ms_p99: float | None
    swaps: int
    swap_ms_mean: float | None
    weights_gib_device: float  # of base or checkpoint, and of all adapters
    weights_gib_host: float  # of all checkpoints, or of all adapters


@dataclass(slots=True)
class Turns:
    """A pass in which checkpoints took turns."""

    seen: Pass
    swap_s: list[float] = field(default_factory=list)

    @property
    def swap_ms_mean(self) -> float | None:
        return round(1000 * statistics.mean(self.swap_s), 2) if self.swap_s else None


def measure_cost(
    bench: ServeBench, where: Surroundings, *, scratch: Path | None = None, tell: Tell = lambda text: None
) -> Iterator[CostRow]:
    """Two rows for each number of fine-tunes, bench.setting.adapters, each pass over an engine that knows of nothing.

    Raises CheckFailed where a request did not get the tokens of its trace, and where an idle engine holds pages.
    """
    with tempfile.TemporaryDirectory(prefix="flora-bench-", dir=scratch) as folder:
        world, seed = make_world(Path(folder), bench, all_numbers(bench)), bench.seeds[0]
        with Bed(config_for(world, count) for count in (0, *bench.setting.adapters)) as bed:
            tell(f"engine built in {bed.start_s} s: {bed.stages}")
            checkpoints: Checkpoints | None = None
            for count in bench.setting.adapters:
                trace = trace_of(bench, count, seed)
                asks = asks_for(bench, trace, count, seed)
                for way in ("adapters", "checkpoints"):
                    engine, config = bed.engine(config_for(world, count if way == "adapters" else 0))
                    warm_up = warm_up_asks(bench, count if way == "adapters" else 0)
                    check_timelines(warm_up, drive_engine(engine, warm_up, world.targets).timelines)
                    checkpoints = checkpoints or Checkpoints(engine)
                    if way == "adapters":
                        turns = Turns(drive_engine(engine, asks, world.targets))
                    else:
                        turns = drive_turns(engine, asks, checkpoints.load)
                    check_timelines(asks, turns.seen.timelines)
                    check_nothing_leaks(engine)
                    yield _row(bench, where, way, count, asks, turns, checkpoints.num_bytes, engine, config)


def _row(
    bench: ServeBench,
    where: Surroundings,
    way: str,
    count: int,
    asks: Sequence[Ask],
    turns: Turns,
    checkpoint_bytes: int,
    engine: Engine,
    config: EngineConfig,
) -> CostRow:
    figures = summarize(asks, turns.seen.timelines, bench.slo_ttft_s)
    adapters_bytes = sum(adapter_bytes(bench.setting, number, adapter_dtype(config)) for number in range(count))
    on_device = checkpoint_bytes + (adapters_bytes if way == "adapters" else 0)
    on_host = adapters_bytes if way == "adapters" else count * checkpoint_bytes
    trace_facts = {name: getattr(bench, name) for name in ("rate", "alpha", "cv")}
    facts: dict[str, Any] = {
        "label": f"cost/{way}/{count}" + (f"/rate-{bench.rate:g}" if bench.rate else ""),
        "system": "flora",
        "commit": where.commit,
        "gpu": where.gpu,
        "kernels": engine.ready.kernels,
        "way": way,
        "shape": bench.setting.shape,
        "modules": bench.setting.modules,
        "fine_tunes": count,
        "ranks": list(bench.setting.ranks),
        "requests": len(asks),
        "lengths": list(bench.setting.lengths),
        "seed": bench.seeds[0],
        "gpu_s_per_m_tok": round(figures["elapsed_s"] / figures["out_tok"] * _M, 2),
        "swaps": len(turns.swap_s),
        "swap_ms_mean": turns.swap_ms_mean,
        "weights_gib_device": round(on_device / 2**30, 6),
        "weights_gib_host": round(on_host / 2**30, 6),
        **trace_facts,
    }
    known = engine_facts(config) | figures
    facts |= {name: known[name] for name in CostRow.__struct_fields__ if name in known and name not in facts}
    return msgspec.convert(facts, CostRow, strict=True)


class Checkpoints:
    """Fine-tunes of the model that an engine holds, in page-locked memory.

    Their weights are the engine's own, once for all of them: random ones are as fast as any, and twenty times 2.5 GB
    would take longer to make than to serve. What they would fill is counted, not held.
    """

    def __init__(self, engine: Engine) -> None:
        self._places = list(tensors_of(engine.runner.model.weights))  # type: ignore[attr-defined]
        self._stored = [_stored(place) for place in self._places]

    @property
    def num_bytes(self) -> int:
        """Of one."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._places)

    def load(self, number: int) -> None:
        """A checkpoint's weights to where the engine's are, in place: captured graphs find them there."""
        for place, stored in zip(self._places, self._stored, strict=True):
            place.copy_(stored, non_blocking=True)
        if self._places[0].is_cuda:
            torch.cuda.synchronize()


def tensors_of(thing: Any) -> Iterator[Tensor]:
    """Every tensor that an object's fields hold, however deep; a shared one once."""
    seen: set[int] = set()

    def walk(held: Any) -> Iterator[Tensor]:
        if id(held) in seen or isinstance(held, str | int | float | bool | type(None)):
            return
        seen.add(id(held))
        if isinstance(held, Tensor):
            yield held
        elif isinstance(held, list | tuple):
            for part in held:
                yield from walk(part)
        elif isinstance(held, dict):
            for part in held.values():
                yield from walk(part)
        elif is_dataclass(held) and not isinstance(held, type):
            for name in held.__dataclass_fields__:
                yield from walk(getattr(held, name))
        elif type(held).__module__.startswith("flora."):
            yield from walk(vars(held))

    yield from walk(thing)


def _stored(place: Tensor) -> Tensor:
    return place.cpu().pin_memory() if place.is_cuda else place.clone()


def drive_turns(engine: Engine, asks: Sequence[Ask], load: Callable[[int], None], clock: Clock | None = None) -> Turns:
    """Serves requests of one checkpoint at a time; the engine is idle at the end.

    asks  in order of arrival; `adapter` names the checkpoint
    load  brings a checkpoint to the device: called when another one was there
    """
    clock = clock or WallClock()
    turns = Turns(Pass([Timeline() for _ in asks]))
    waiting, there, start_s = list(range(len(asks))), None, clock.now()
    while waiting:
        now_s = clock.now() - start_s
        due = [i for i in waiting if asks[i].due_s <= now_s]
        if not due:
            clock.sleep_until(start_s + asks[waiting[0]].due_s)
            continue
        wanted = asks[due[0]].adapter
        assert wanted is not None
        if wanted != there:
            before_s = clock.now()
            load(wanted)
            turns.swap_s.append(clock.now() - before_s)
            there = wanted
        part = [i for i in due if asks[i].adapter == wanted]
        began_s = clock.now() - start_s
        seen = drive_engine(engine, [replace(asks[i], adapter=None, due_s=0.0) for i in part], {}, clock)
        for i, timeline in zip(part, seen.timelines, strict=True):
            timeline.shift(began_s)
            turns.seen.timelines[i] = timeline
        turns.seen.step_s += seen.step_s
        served = set(part)
        waiting = [i for i in waiting if i not in served]
    return turns
