"""Who can no longer have his first token in time: S-LoRA's admission control (arXiv:2311.03285, section 4.3).

With a fixed capacity and a reward that falls with the wait, the best that can be served is the latest set of requests
that can still make it, in the order of arrival (its appendix B). As its released code does, this refuses whoever cannot
make it, and takes the newest first while more arrive than are admitted. Times are numbers that the caller brings.
"""

from collections import deque

from flora.serve.engine.schedule.sequence import PENDING, Sequence, State

_WINDOW_S = 1.0  # over which arrivals and admissions are counted
_KEPT = 0.7  # of an estimate when a new observation comes: S-LoRA's


class EarlyAbort:
    """Estimates from what happened; `late` is who is to be refused now."""

    def __init__(self, slo_ttft_s: float) -> None:
        self.slo_ttft_s = slo_ttft_s
        self.prefill_s = 0.0  # from admission to the first token
        self._waiting: deque[Sequence] = (
            deque()
        )  # by arrival; those that were admitted or cancelled drop out at its head
        self._prefilling: list[Sequence] = []  # admitted; their first token is not launched yet
        self._window_s: float | None = None  # when the present window began
        self._arrived = self._admitted = 0  # in it
        self._arrivals = self._admissions = 0.0  # estimates, per window

    @property
    def newest_first(self) -> bool:
        """Whether more arrive than can be admitted."""
        return self._arrivals > 0 and self._arrivals >= self._admissions

    def note_arrival(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)
        self._arrived += 1

    def note_admission(self, sequence: Sequence) -> None:
        self._prefilling.append(sequence)
        self._admitted += 1

    def late(self, now_s: float) -> list[Sequence]:
        """Waiting sequences without a token that cannot have one within slo_ttft_s of their arrival."""
        self._observe(now_s)
        found: list[Sequence] = []
        while self._waiting:
            oldest = self._waiting[0]
            waits = oldest.state is State.WAITING and oldest.admitted_s is None
            if waits and now_s + self.prefill_s - oldest.arrived_s <= self.slo_ttft_s:
                break
            self._waiting.popleft()
            if waits:
                found.append(oldest)
        return found

    def _observe(self, now_s: float) -> None:
        prefilling = []
        for sequence in self._prefilling:
            is_told = sequence.num_generated and sequence.tokens[sequence.num_prompt] != PENDING
            if is_told and sequence.admitted_s is not None:
                self.prefill_s = _KEPT * self.prefill_s + (1 - _KEPT) * (now_s - sequence.admitted_s)
            elif sequence.state is not State.FINISHED:
                prefilling.append(sequence)
        self._prefilling = prefilling
        if self._window_s is None:
            self._window_s = now_s
        while now_s - self._window_s >= _WINDOW_S:
            self._arrivals = _KEPT * self._arrivals + (1 - _KEPT) * self._arrived
            self._admissions = _KEPT * self._admissions + (1 - _KEPT) * self._admitted
            self._arrived = self._admitted = 0
            self._window_s += _WINDOW_S
