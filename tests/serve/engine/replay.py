"""A seeded trace played through a scheduler: who is admitted when, and who waits how long.

A step takes 0.05 s, whatever is in it; a load takes as long as the test says, one at a time.
"""

from dataclasses import dataclass, field
from typing import Any

from flora.bench.trace import Trace, Workload, draw_trace
from flora.serve.engine.schedule.scheduler import Plan
from flora.serve.engine.schedule.sequence import Sequence
from tests.serve.engine.desk import Desk

STEP_S = 0.05
ADAPTER_PAGES = 3


@dataclass
class Replay:
    """What became of a trace, request by request."""

    desk: Desk
    sequences: list[Sequence] = field(default_factory=list)
    first_token_s: dict[Sequence, float] = field(default_factory=dict)  # since arrival
    admitted: list[Sequence] = field(default_factory=list)  # in order
    refused: list[Sequence] = field(default_factory=list)
    adapters_of_steps: list[int] = field(default_factory=list)  # different adapters in each step's rows
    num_placed: int = 0  # adapters that were copied to the device
    end_s: float = 0.0

    def wait_s(self, of: str | None = None) -> float:
        """Mean time to the first token, of one adapter's requests or of all."""
        waits = [wait for sequence, wait in self.first_token_s.items() if of is None or sequence.digest == of]
        return sum(waits) / len(waits)

    def attainment(self, slo_s: float) -> float:
        return sum(wait <= slo_s for wait in self.first_token_s.values()) / len(self.sequences)


def replay(trace: Trace, *, load_s: float | None = None, until_s: float = 1e9, **settings: Any) -> Replay:
    """The trace through a desk with these settings. load_s: of one adapter; None: all lie in host memory."""
    names = [f"a{number}" for number in trace.adapters]
    desk = Desk(
        **{"num_pages": 200, "packed": {} if load_s else dict.fromkeys(names, ADAPTER_PAGES), "max_waiting": 10_000}
        | settings
    )
    done = Replay(desk)
    now_s, loading = 0.0, None
    while len(done.sequences) < trace.num_requests or not desk.scheduler.is_empty:
        while len(done.sequences) < trace.num_requests and trace.arrivals_s[len(done.sequences)] <= now_s:
            number = len(done.sequences)
            arguments = {"max_tokens": int(trace.output_lens[number]), "adapter": names[number]}
            at_s = float(trace.arrivals_s[number])
            done.sequences.append(desk.submit(str(number), trace.prompts[number], at_s=at_s, **arguments))
        if loading and now_s >= loading[1]:
            desk.load(loading[0], ADAPTER_PAGES)
            loading = None
        if load_s and not loading:
            wanted = next(iter(desk.scheduler.wanted_adapters()), None)
            loading = (wanted.serving_digest, now_s + load_s) if wanted else None
        for sequence in desk.scheduler.late(now_s):
            done.refused.append(sequence)
            desk.scheduler.finish(sequence)
        plan = desk.scheduler.plan(now_s)
        desk.commit(plan)
        now_s += STEP_S
        note(done, plan, now_s)
        if now_s > until_s:
            break
    done.end_s = now_s
    return done


def note(done: Replay, plan: Plan, now_s: float) -> None:
    known = set(done.admitted)
    done.admitted += [chunk.sequence for chunk in plan.chunks if chunk.sequence not in known]
    done.adapters_of_steps.append(len({chunk.sequence.digest for chunk in plan.chunks}))
    done.num_placed += len(plan.placed)
    for chunk in plan.chunks:
        if chunk.samples:
            done.first_token_s.setdefault(chunk.sequence, now_s - chunk.sequence.arrived_s)


def trace_of(**workload: Any) -> Trace:
    return draw_trace(Workload(**{"lengths": (4, 24)} | workload), seed=42)
