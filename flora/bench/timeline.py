"""What happened to each request, and whether it is what was asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from flora.bench.asks import Ask
from flora.errors import CheckFailed

Outcome = Literal["length", "cancelled", "aborted", "failed"]


@dataclass(slots=True)
class Timeline:
    """One request's; whoever drives the requests owns it. Times are seconds after the start of the pass."""

    sent_s: float | None = None
    piece_s: list[float] = field(default_factory=list)  # when each piece of the answer came: in process, one a token
    num_tokens: int = 0
    prompt_tokens: int | None = None  # as the server counted them, where it says so
    end_s: float | None = None
    outcome: Outcome | None = None  # aborted: given up by the server, because its first token would come too late
    message: str = ""  # of a failure

    @property
    def first_s(self) -> float | None:
        return self.piece_s[0] if self.piece_s else None

    def shift(self, by_s: float) -> None:
        """Counts from a start that was so much earlier."""
        self.sent_s = None if self.sent_s is None else self.sent_s + by_s
        self.piece_s = [moment_s + by_s for moment_s in self.piece_s]
        self.end_s = None if self.end_s is None else self.end_s + by_s

    def end(self, outcome: Outcome, now_s: float, message: str = "") -> None:
        assert self.outcome is None, "a request ends once"
        self.outcome, self.end_s, self.message = outcome, now_s, message


def check_timelines(
    asks: Sequence[Ask], timelines: Sequence[Timeline], *, may_abort: bool = False, may_stop: bool = False
) -> None:
    """Raises CheckFailed where a request has not the tokens of its trace: then no figure is worth printing.

    may_abort  the server gives up requests that are late;  may_stop  an end-of-sequence token ends an answer early
    """
    for number, (ask, seen) in enumerate(zip(asks, timelines, strict=True)):
        expected = "cancelled" if ask.cancel_after is not None else "length"
        if seen.outcome == "aborted" and may_abort:
            continue
        if seen.outcome != expected:
            _fail(number, f"ended as {seen.outcome!r} and should end as {expected!r}", seen.message)
        is_short = may_stop and 0 < seen.num_tokens < ask.num_tokens
        if seen.outcome == "length" and seen.num_tokens != ask.num_tokens and not is_short:
            _fail(number, f"got {seen.num_tokens} tokens and asked for {ask.num_tokens}")
        if ask.cancel_after is not None and not ask.cancel_after <= seen.num_tokens < ask.num_tokens:
            _fail(number, f"was cancelled after {ask.cancel_after} of {ask.num_tokens} tokens, got {seen.num_tokens}")
        if seen.prompt_tokens is not None and seen.prompt_tokens != len(ask.prompt):
            _fail(number, f"sent {len(ask.prompt)} prompt tokens and the server counted {seen.prompt_tokens}")


def _fail(number: int, what: str, cause: str = "") -> None:
    raise CheckFailed(f"request {number} of the trace {what}", cause=cause or None, request=number)
