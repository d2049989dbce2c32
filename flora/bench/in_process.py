"""Requests straight into an engine of this process: no HTTP, no text, as the offline classes of other engines do."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flora.bench.asks import Ask
from flora.bench.clock import Clock, WallClock
from flora.bench.timeline import Timeline
from flora.errors import CheckFailed, DeadlineMissed
from flora.serve.engine import Engine
from flora.serve.messages import Cancel, Rejected, StepEvents, Submit, TokenEvent
from flora.serve.request import AdapterTarget, SamplingParams

_PATIENCE_S = 1.0  # for a load, before the loop looks around again


@dataclass(slots=True)
class Pass:
    """What one pass over a list of requests showed."""

    timelines: list[Timeline]
    step_s: list[float] = field(default_factory=list)  # of each turn of the loop, from plan to tokens
    full_batch_after_s: float | None = None  # until as many sequences ran as the engine runs at once
    counts: dict[str, Any] = field(default_factory=dict)  # of the engine, over the pass

    @property
    def step_ms_p50(self) -> float:
        return round(statistics.median(self.step_s) * 1000, 2) if self.step_s else 0.0


def drive_engine(
    engine: Engine, asks: Sequence[Ask], targets: Mapping[int, AdapterTarget], clock: Clock | None = None
) -> Pass:
    """Submits each request when it is due and steps until the last has ended; the engine is idle then.

    A request that falls due while a step runs is submitted when that step ends: the loop has one thread, as the
    engine's own process has. asks: in order of arrival.
    """
    return _Drive(engine, asks, targets, clock or WallClock()).run()


class _Drive:
    def __init__(self, engine: Engine, asks: Sequence[Ask], targets: Mapping[int, AdapterTarget], clock: Clock) -> None:
        self._engine = engine
        self._asks = asks
        self._targets = targets
        self._clock = clock
        self._seen = Pass([Timeline() for _ in asks])
        self._num_sent = 0
        self._num_ended = 0
        self._start_s = 0.0

    def run(self) -> Pass:
        engine, asks, seen = self._engine, self._asks, self._seen
        before = engine.heartbeat()
        self._start_s = self._clock.now()
        while self._num_ended < len(asks):
            self._submit_due()
            next_s = asks[self._num_sent].due_s if self._num_sent < len(asks) else None
            if engine.is_idle and next_s is not None:
                self._clock.sleep_until(self._start_s + next_s)
                continue
            started_s = self._now()
            self._take(engine.step(wait_s=_PATIENCE_S if next_s is None else min(_PATIENCE_S, next_s - started_s)))
            seen.step_s.append(self._now() - started_s)
        while not engine.is_idle:
            engine.step()
        after = engine.heartbeat()
        loads = after.adapter_loads - before.adapter_loads
        load_s = after.adapter_load_seconds - before.adapter_load_seconds
        seen.counts = {
            "steps": after.steps - before.steps,
            "loads": loads,
            "load_ms_mean": round(1000 * load_s / max(1, loads), 1),
            "evictions": after.adapter_evictions - before.adapter_evictions,
            "preemptions": after.preemptions - before.preemptions,
        }
        return seen

    def _now(self) -> float:
        return self._clock.now() - self._start_s

    def _submit_due(self) -> None:
        while self._num_sent < len(self._asks) and self._asks[self._num_sent].due_s <= self._now():
            number, ask = self._num_sent, self._asks[self._num_sent]
            self._seen.timelines[number].sent_s = self._now()
            self._num_sent += 1
            self._engine.submit(
                Submit(
                    request_id=str(number),
                    prompt=ask.prompt,
                    sampling=SamplingParams(
                        max_tokens=ask.num_tokens,
                        temperature=ask.temperature,
                        top_p=ask.top_p,
                        seed=number,
                        ignore_eos=True,
                    ),
                    adapter=None if ask.adapter is None else self._targets[ask.adapter],
                )
            )

    def _take(self, told: Sequence[tuple[bytes, Any]]) -> None:
        now_s = self._now()
        seen, scheduler = self._seen, self._engine.scheduler
        if seen.full_batch_after_s is None and len(scheduler.running) >= scheduler.limits.max_sequences:
            seen.full_batch_after_s = round(now_s, 2)
        for _, message in told:
            if isinstance(message, StepEvents):
                for event in message.events:
                    self._take_event(event, now_s)
            elif isinstance(message, Rejected):
                is_late = message.code == DeadlineMissed.code
                timeline = seen.timelines[int(message.request_id)]
                timeline.end("aborted" if is_late else "failed", now_s, message.message)
                self._num_ended += 1
            else:
                raise CheckFailed(f"the engine said {type(message).__name__}, which nobody asked for")

    def _take_event(self, event: TokenEvent, now_s: float) -> None:
        number = int(event.request_id)
        timeline, cancel_after = self._seen.timelines[number], self._asks[number].cancel_after
        for _ in event.token_ids:
            timeline.piece_s.append(now_s)
        timeline.num_tokens += len(event.token_ids)
        if event.finish_reason:
            is_expected = event.finish_reason in ("length", "cancelled")
            timeline.end(event.finish_reason if is_expected else "failed", now_s, event.error or event.finish_reason)  # type: ignore[arg-type]
            self._num_ended += 1
        elif cancel_after is not None and timeline.num_tokens >= cancel_after:
            self._engine.cancel(Cancel(request_id=event.request_id))
