"""Time for tests: it passes when someone looks, and jumps where someone sleeps."""


class SteppingClock:
    """Time that passes by a millisecond whenever someone looks, and jumps where someone sleeps."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.slept: list[float] = []  # until when, each time

    def now(self) -> float:
        self.now_s += 0.001
        return self.now_s

    def sleep_until(self, moment_s: float) -> None:
        assert moment_s >= self.now_s - 0.01, "nobody waits for the past"
        self.slept.append(moment_s)
        self.now_s = max(self.now_s, moment_s)
