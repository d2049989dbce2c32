"""What a server can do that merges adapters into the base's weights: it serves one adapter at a time."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from flora.bench.asks import Ask
from flora.bench.clock import Clock
from flora.bench.in_process import Pass, drive_engine
from flora.bench.timeline import Timeline
from flora.serve.engine import Engine

_MOST_BEFORE = 30  # requests of other adapters that one may overtake


def drive_merged(
    engine: Engine, asks: Sequence[Ask], turn_tokens: int | None = None, clock: Clock | None = None
) -> Pass:
    """Each adapter's requests on their own, turn by turn: see merged_turns.

    Merged weights are as fast as the base's, so the base answers here; the time that merging takes is left out, in the
    comparison's disfavor. asks: all due at once
    """
    assert all(ask.due_s == 0 for ask in asks), "whoever waits for his adapter's turn has arrived"
    whole = Pass([Timeline() for _ in asks])
    start_s = 0.0
    for places in merged_turns(asks, turn_tokens):
        part = drive_engine(engine, [replace(asks[i], adapter=None) for i in places], {}, clock)
        for i, timeline in zip(places, part.timelines, strict=True):
            timeline.shift(start_s)
            whole.timelines[i] = timeline
        start_s = max(timeline.end_s or 0.0 for timeline in part.timelines)
        whole.step_s += part.step_s
        whole.counts = {name: whole.counts.get(name, 0) + count for name, count in part.counts.items()}
    return whole


def merged_turns(asks: Sequence[Ask], turn_tokens: int | None) -> Iterator[list[int]]:
    """Which requests are served together by a server of one merged adapter at a time: their places, turn by turn.

    The adapter of the first who waits has the turn.
    turn_tokens  None: all of its requests share it, which is the best that can be done where all of them are known.
                 Else a turn begins with so many tokens of prompts (or one request), and goes on with as many more
                 while no more than 30 requests of other adapters stand before its next one: S-LoRA's queue for merged
                 adapters (its release, PEFTReqQueue), whose batch_max_tokens this is.
    """
    waiting = list(range(len(asks)))
    while waiting:
        adapter = asks[waiting[0]].adapter
        own = [i for i in waiting if asks[i].adapter == adapter]
        taken: list[int] = []
        while len(taken) < len(own) and (not taken or _others_before(own[len(taken)], waiting, asks) <= _MOST_BEFORE):
            taken += _batch(own[len(taken) :], asks, turn_tokens)
        yield taken
        waiting = sorted(set(waiting) - set(taken))


def _others_before(place: int, waiting: Sequence[int], asks: Sequence[Ask]) -> int:
    return sum(i < place and asks[i].adapter != asks[place].adapter for i in waiting)


def _batch(places: Sequence[int], asks: Sequence[Ask], most_tokens: int | None) -> Sequence[int]:
    """The first places whose prompts together have no more tokens; the very first in any case."""
    if most_tokens is None:
        return places
    ends = itertools.accumulate(len(asks[i].prompt) for i in places)
    return places[: max(1, sum(end <= most_tokens for end in ends))]
