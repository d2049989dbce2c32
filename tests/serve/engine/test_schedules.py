"""Merge mode's schedule: the same seeded trace for one adapter, with it merged into the base and beside it.

What the scheduler's own switches change stands in `test_policies.py`: fairness, early abort, clustering, prefetch.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest

from flora.bench.trace import Workload, draw_trace
from flora.serve.engine import Engine
from flora.serve.request import AdapterTarget, SamplingParams
from tests.serve.engine.adapters import random_adapter
from tests.serve.engine.bases import VOCAB
from tests.serve.engine.worlds import World, ask, run_to_end

TRACE = draw_trace(Workload(num_requests=12, num_adapters=1, lengths=(2, 9)), seed=42)


@dataclass
class Seen:
    """What an engine did with the trace."""

    slots: set[int | None] = field(default_factory=set)  # of adapters, over all rows that it ran
    num_steps: int = 0
    num_loads: int = 0
    adapter_pages: int = 0
    first_step_rows: int = 0
    answers: list[list[int]] = field(default_factory=list)


def replay(engine: Engine, target: AdapterTarget | None) -> Seen:
    """The whole trace there at once, all of it for one adapter, or for whatever the base is."""
    seen, launch = Seen(), engine.runner.launch

    def watched(chunks: Any, adapter_slots: Any) -> Any:
        seen.slots |= set(adapter_slots)
        seen.first_step_rows = seen.first_step_rows or sum(chunk.count for chunk in chunks)
        return launch(chunks, adapter_slots)

    engine.runner.launch = watched  # type: ignore[method-assign]
    for number, (prompt, length) in enumerate(zip(TRACE.prompts, TRACE.output_lens, strict=True)):
        sampling = SamplingParams(max_tokens=int(length), temperature=0.0, ignore_eos=True)
        ask(engine, str(number), [token % VOCAB for token in prompt], target, sampling)
    answers = run_to_end(engine)
    beat = engine.heartbeat()
    seen.num_steps, seen.num_loads, seen.adapter_pages = beat.steps, beat.adapter_loads, beat.adapter_pages
    seen.answers = [answers[str(number)].tokens for number in range(TRACE.num_requests)]
    engine.close()
    return seen


@pytest.fixture
def target(world: World) -> AdapterTarget:
    return world.add(random_adapter(world.config, seed=1), "a")


def test_merged_nothing_is_loaded_and_no_row_meets_an_adapter(world, target):
    beside = replay(world.engine(max_sequences=4), target)
    merged = replay(world.engine(max_sequences=4, merge=target), None)

    assert (beside.slots, beside.num_loads) == ({0}, 1)
    assert beside.adapter_pages > 0
    assert (merged.slots, merged.num_loads, merged.adapter_pages) == ({None}, 0, 0)


def test_merged_the_first_step_has_rows_and_the_answers_are_the_adapters(world, target):
    """Nobody waits for a load; the weights are rounded once more, which these answers do not show."""
    beside = replay(world.engine(max_sequences=4), target)
    merged = replay(world.engine(max_sequences=4, merge=target), None)
    base = replay(world.engine(max_sequences=4), None)

    assert merged.answers == beside.answers != base.answers
    assert merged.num_steps == base.num_steps
    assert merged.first_step_rows == base.first_step_rows > 0
