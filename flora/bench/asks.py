"""A trace as things to ask: what, for which adapter, when, and whether its client will lose interest."""

from dataclasses import dataclass

import numpy as np

from flora.bench.trace import Trace


@dataclass(frozen=True, slots=True)
class Ask:
    prompt: tuple[int, ...]  # token ids
    num_tokens: int  # of the answer, end-of-sequence ignored
    due_s: float  # after the start
    adapter: int | None  # its number; None is the base
    cancel_after: int | None = None  # tokens after which the client goes away
    temperature: float = 0.0  # of its tokens; 0: the likeliest
    top_p: float = 1.0


def asks_of(
    trace: Trace,
    *,
    has_adapters: bool,
    cancel: float = 0.0,
    seed: int = 0,
    offset: int = 0,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> list[Ask]:
    """The trace's requests in order of arrival.

    cancel  share of them, drawn by `seed`, whose client goes away when half of its answer has come
    offset  added to every adapter's number
    """
    goes_away = (np.random.RandomState(seed).random_sample(trace.num_requests) < cancel) & (trace.output_lens > 1)
    return [
        Ask(
            prompt=prompt,
            num_tokens=int(trace.output_lens[i]),
            due_s=float(trace.arrivals_s[i]),
            adapter=int(trace.adapters[i]) + offset if has_adapters else None,
            cancel_after=int(trace.output_lens[i]) // 2 if goes_away[i] else None,
            temperature=temperature,
            top_p=top_p,
        )
        for i, prompt in enumerate(trace.prompts)
    ]
