"""From timelines to figures."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from flora.bench.asks import Ask
from flora.bench.timeline import Timeline


def summarize(
    asks: Sequence[Ask], timelines: Sequence[Timeline], slo_ttft_s: float, *, closed_loop: bool = False
) -> dict[str, Any]:
    """The figures of one pass, as a row has them.

    elapsed  from the first arrival of the trace to the last end
    ttft     first token after the request's arrival in the trace, so a late client counts against the server
    tpot     time per token after the first, of requests that ran to their length
    gap      between two pieces of one answer
    closed loop: a request arrives when a client is free to send it, not when its trace says
    SLO attainment counts every request that was not cancelled; one that the server gave up has not met it.
    """
    pairs = list(zip(asks, timelines, strict=True))
    ends = [seen.end_s for _, seen in pairs if seen.end_s is not None]
    elapsed_s = max(ends) - asks[0].due_s
    done = [(ask, seen) for ask, seen in pairs if seen.outcome == "length"]
    out_tokens = sum(seen.num_tokens for _, seen in pairs)
    arrivals_s = [seen.sent_s if closed_loop and seen.sent_s is not None else ask.due_s for ask, seen in pairs]
    ttft_s = [seen.first_s - at for (_, seen), at in zip(pairs, arrivals_s, strict=True) if seen.first_s is not None]
    tpot_s = [(s.piece_s[-1] - s.piece_s[0]) / (s.num_tokens - 1) for _, s in done if s.num_tokens > 1]
    gaps_s = [later - earlier for _, seen in pairs for earlier, later in pairwise(seen.piece_s)]
    late_s = [seen.sent_s - at for (_, seen), at in zip(pairs, arrivals_s, strict=True) if seen.sent_s is not None]
    judged = [(seen, at) for (_, seen), at in zip(pairs, arrivals_s, strict=True) if seen.outcome != "cancelled"]
    met = sum(seen.first_s is not None and seen.first_s - at <= slo_ttft_s for seen, at in judged)
    return {
        "in_tok": sum(len(ask.prompt) for ask, seen in pairs if seen.first_s is not None),
        "out_tok": out_tokens,
        "completed": len(done),
        "cancelled": sum(seen.outcome == "cancelled" for _, seen in pairs),
        "aborted": sum(seen.outcome == "aborted" for _, seen in pairs),
        "elapsed_s": round(elapsed_s, 2),
        "req_s": round(len(done) / elapsed_s, 2),
        "out_tok_s": round(out_tokens / elapsed_s, 1),
        "ttft_ms_p50": _ms(ttft_s, 50),
        "ttft_ms_p99": _ms(ttft_s, 99),
        "tpot_ms_p50": _ms(tpot_s, 50),
        "tpot_ms_p99": _ms(tpot_s, 99),
        "gap_ms_p50": _ms(gaps_s, 50),
        "gap_ms_p99": _ms(gaps_s, 99),
        "slo_ttft_s": slo_ttft_s,
        "slo_attainment": round(met / len(judged), 4) if judged else None,
        "send_delay_ms_p99": _ms(late_s, 99),
    }


def _ms(seconds: Sequence[float], percent: float) -> float | None:
    return round(float(np.percentile(seconds, percent)) * 1000, 2) if len(seconds) else None
