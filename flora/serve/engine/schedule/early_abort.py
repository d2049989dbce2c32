"""Who can no longer have his first token in time: S-LoRA's admission control (arXiv:2311.03285, section 4.3).

With a fixed capacity and a reward that falls with the wait, the best that can be served is the latest set of requests
that can still make it, in the order of arrival (its appendix B). As its released code does, this refuses whoever cannot
make it, and takes the newest first while more arrive than are admitted. Times are numbers that the caller brings.

What a prefill takes is an estimate, and it may refuse nobody for ever. Where nothing runs it does not count: only who
has waited for slo_ttft_s already is refused. Where something runs it shrinks with each second in which nobody is on the
way to a first token, until the next one is let in and tells what a prefill takes now.
"""

from collections import deque

from flora.serve.engine.schedule.sequence import PENDING, Sequence, State

_WINDOW_S = 1.0  # over which arrivals and admissions are counted
_KEPT = 0.7  # of an estimate when a new observation comes: S-LoRA's
_OVERLOAD = 1.1  # times as many arrivals as admissions; a few more are those that wait for the next window


class EarlyAbort:
    """Estimates from what happened; `late` is who is to be refused now."""

    def __init__(self, slo_ttft_s: float) -> None:
        self.slo_ttft_s = slo_ttft_s
        self.prefill_s = 0.0  # from admission to the first token
        self._waiting: deque[Sequence] = (
            deque()
        )  # by arrival; those that were admitted or cancelled drop out at its head
        self._prefilling: list[Sequence] = []  # admitted and running; their first token is not told yet
        self._window_s: float | None = None  # when the present window began
        self._arrived = self._admitted = self._told = 0  # in it; told: first tokens
        self._arrivals = self._admissions = 0.0  # estimates, per window

    @property
    def newest_first(self) -> bool:
        """Whether clearly more arrive than are admitted."""
        return self._arrivals > _OVERLOAD * self._admissions

    def note_arrival(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)
        self._arrived += 1

    def note_admission(self, sequence: Sequence) -> None:
        self._prefilling.append(sequence)
        self._admitted += 1

    def late(self, now_s: float, *, is_idle: bool) -> list[Sequence]:
        """Waiting sequences without a token that cannot have one within slo_ttft_s of their arrival.

        is_idle  nothing runs: the time that has passed decides, and no estimate. To be asked before each step.
        """
        self._observe(now_s)
        prefill_s = 0.0 if is_idle else self.prefill_s
        found: list[Sequence] = []
        while self._waiting:
            oldest = self._waiting[0]
            waits = oldest.state is State.WAITING and oldest.admitted_s is None
            if waits and now_s + prefill_s - oldest.arrived_s <= self.slo_ttft_s:
                break
            self._waiting.popleft()
            if waits:
                found.append(oldest)
        return found

    def _observe(self, now_s: float) -> None:
        self._roll_windows(now_s)  # first: what is seen now says nothing of windows that are over
        prefilling = []
        for sequence in self._prefilling:
            is_told = sequence.num_generated and sequence.tokens[sequence.num_prompt] != PENDING
            if is_told and sequence.admitted_s is not None:
                self.prefill_s = _KEPT * self.prefill_s + (1 - _KEPT) * (now_s - sequence.admitted_s)
                self._told += 1
            elif sequence.state is State.RUNNING:  # one that was preempted waits for its turn again: no measure
                prefilling.append(sequence)
        self._prefilling = prefilling

    def _roll_windows(self, now_s: float) -> None:
        if self._window_s is None:
            self._window_s = now_s
        while now_s - self._window_s >= _WINDOW_S:
            self._arrivals = _KEPT * self._arrivals + (1 - _KEPT) * self._arrived
            self._admissions = _KEPT * self._admissions + (1 - _KEPT) * self._admitted
            if not self._told and not self._prefilling:
                self.prefill_s *= _KEPT
            self._arrived = self._admitted = self._told = 0
            self._window_s += _WINDOW_S
