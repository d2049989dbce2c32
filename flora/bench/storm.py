"""A storm of loads: what streams that are under way feel of adapters that are loaded beside them.

Every stream decodes; the gaps between its tokens are gathered for a while in peace, and for as long while adapters that
nobody had before are loaded at a steady rate. Streams start anew for each: a step takes longer the more its sequences
have said, so both must begin where the other did.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from flora.bench.clock import Clock, WallClock
from flora.bench.facts import Surroundings, engine_facts
from flora.bench.settings import ServeBench
from flora.errors import CheckFailed
from flora.serve.config import EngineConfig
from flora.serve.engine import Engine
from flora.serve.messages import AdapterLoaded, Cancel, FromEngine, LoadAdapter, Rejected, StepEvents, Submit
from flora.serve.request import AdapterTarget, SamplingParams

_PROMPT_TOKENS = 32
FIRST_TOKENS = 16  # of every stream, before the clock starts
_PATIENCE_S = 1.0
_PROMPT_SEED = 11


@dataclass(frozen=True, slots=True, kw_only=True)
class Storm:
    rate: float  # adapters a second
    num_streams: int
    window_s: float  # of peace, and of storm

    @property
    def num_loads(self) -> int:
        return int(self.rate * self.window_s)


class StormRow(msgspec.Struct, frozen=True, kw_only=True):
    """One storm. Gaps are between two tokens of one stream."""

    system: str
    version: str | None
    commit: str | None
    gpu: str | None
    device: str | None
    torch: str | None
    triton: str | None
    kernels: dict[str, str]
    shape: str
    modules: str
    ranks: list[int]
    storm: float  # loads a second that were asked for
    streams: int
    window_s: float
    loads: int  # answered within the window
    load_ms_p50: float | None  # from order to answer
    load_ms_p99: float | None
    gap_ms_p50_before: float
    gap_ms_p99_before: float
    gap_ms_p50_during: float
    gap_ms_p99_during: float
    gap_p99_ratio: float  # during over before
    max_batch_tokens: int
    max_sequences: int
    pool_gib: float
    host_gib: float
    evictions: int
    preemptions: int
    switches: dict[str, bool | int | float | str | None]
    label: str | None = None  # what a suite calls this measurement


@dataclass(slots=True)
class Weather:
    """What was seen; one per storm, filled as it goes."""

    gaps_before_s: list[float] = field(default_factory=list)
    gaps_during_s: list[float] = field(default_factory=list)
    load_ms: list[float] = field(default_factory=list)


def drive_storm(
    engine: Engine,
    storm: Storm,
    streams: Sequence[AdapterTarget],
    newcomers: Sequence[AdapterTarget],
    clock: Clock | None = None,
) -> Weather:
    """Runs it to the end; the engine is idle then.

    streams    the adapters that streams use, in turn;  newcomers: those to load, storm.num_loads of them
    Raises CheckFailed where a load is refused, or a stream ends before the storm does.
    """
    return _Drive(engine, storm, streams, newcomers, clock or WallClock()).run()


def storm_prompts(storm: Storm) -> list[tuple[int, ...]]:
    """Of the streams: token ids."""
    rng = np.random.RandomState(_PROMPT_SEED)
    return [tuple(rng.randint(10, 1000, _PROMPT_TOKENS).tolist()) for _ in range(storm.num_streams)]


class _Drive:
    def __init__(
        self,
        engine: Engine,
        storm: Storm,
        streams: Sequence[AdapterTarget],
        newcomers: Sequence[AdapterTarget],
        clock: Clock,
    ) -> None:
        self._engine = engine
        self._storm = storm
        self._streams = streams
        self._newcomers = newcomers
        self._clock = clock
        self._weather = Weather()
        self._last_s: dict[str, float] = {}  # of each stream's latest token
        self._tokens: dict[str, int] = {}

    def run(self) -> Weather:
        self._start_streams()
        end_s = self._clock.now() + self._storm.window_s
        while self._clock.now() < end_s:
            self._step(self._weather.gaps_before_s)
        self._end_streams()
        self._start_streams()
        self._load_newcomers()
        self._end_streams()
        return self._weather

    def _load_newcomers(self) -> None:
        storm, start_s, num_ordered = self._storm, self._clock.now(), 0
        while self._clock.now() < start_s + storm.window_s:
            due = min(storm.num_loads, int((self._clock.now() - start_s) * storm.rate) + 1)
            for target in self._newcomers[num_ordered:due]:
                self._engine.load_adapter(LoadAdapter(request_id=target.label, adapter=target))
            num_ordered = max(num_ordered, due)
            self._step(self._weather.gaps_during_s)

    def _start_streams(self) -> None:
        """Every one has its first tokens when this returns."""
        self._last_s, self._tokens = {}, {}
        room = self._engine.ready.max_context - _PROMPT_TOKENS - 1
        for i, prompt in enumerate(storm_prompts(self._storm)):
            sampling = SamplingParams(max_tokens=room, temperature=0.0, ignore_eos=True)
            adapter = self._streams[i % len(self._streams)] if self._streams else None
            self._engine.submit(Submit(request_id=f"stream-{i}", prompt=prompt, sampling=sampling, adapter=adapter))
        while len(self._tokens) < self._storm.num_streams or min(self._tokens.values()) < FIRST_TOKENS:
            self._step([])

    def _end_streams(self) -> None:
        for name in self._tokens:
            self._engine.cancel(Cancel(request_id=name))
        while not self._engine.is_idle:  # loads that come too late are not counted, but none may be refused
            _check_nothing_refused(self._engine.step(wait_s=_PATIENCE_S))

    def _step(self, gaps_s: list[float]) -> None:
        told = self._engine.step(wait_s=_PATIENCE_S)
        now_s = self._clock.now()
        _check_nothing_refused(told)
        for _, message in told:
            match message:
                case StepEvents():
                    for event in message.events:
                        if event.finish_reason:
                            raise CheckFailed(
                                f"{event.request_id} ended before the storm did: {event.error or event.finish_reason}",
                                fix="give longer streams (--max-len), or a shorter storm (--storm-seconds)",
                            )
                        name = event.request_id
                        if name in self._last_s:
                            gaps_s.append(now_s - self._last_s[name])
                        self._last_s[name] = now_s
                        self._tokens[name] = self._tokens.get(name, 0) + 1
                case AdapterLoaded():
                    self._weather.load_ms.append(message.load_ms)


def _check_nothing_refused(told: Sequence[tuple[bytes, FromEngine]]) -> None:
    for _, message in told:
        if isinstance(message, Rejected):
            raise CheckFailed(f"the engine refused {message.request_id}: {message.message}")


def storm_row(
    bench: ServeBench,
    storm: Storm,
    weather: Weather,
    where: Surroundings,
    config: EngineConfig,
    kernels: Mapping[str, str],
    counts: Mapping[str, int],
    system: str = "flora",
) -> StormRow:
    """counts: evictions and preemptions of the whole storm"""
    before, during = (_percentiles_ms(gaps) for gaps in (weather.gaps_before_s, weather.gaps_during_s))
    loads = _percentiles_ms([ms / 1000 for ms in weather.load_ms]) if weather.load_ms else (None, None)
    facts: dict[str, Any] = {
        "system": system,
        "commit": where.commit,
        "gpu": where.gpu,
        "kernels": dict(kernels),
        "shape": bench.setting.shape,
        "modules": bench.setting.modules,
        "ranks": list(bench.setting.ranks),
        "storm": storm.rate,
        "streams": storm.num_streams,
        "window_s": storm.window_s,
        "loads": len(weather.load_ms),
        "load_ms_p50": loads[0],
        "load_ms_p99": loads[1],
        "gap_ms_p50_before": before[0],
        "gap_ms_p99_before": before[1],
        "gap_ms_p50_during": during[0],
        "gap_ms_p99_during": during[1],
        "gap_p99_ratio": round(during[1] / before[1], 3),
        **counts,
        **engine_facts(config),
    }
    return msgspec.convert(facts, StormRow, strict=True)


def _percentiles_ms(seconds: Sequence[float]) -> tuple[float, float]:
    p50, p99 = np.percentile(seconds, (50, 99)) * 1000
    return round(float(p50), 2), round(float(p99), 2)
