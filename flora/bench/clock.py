"""Time as a benchmark needs it: read, and waited for."""

import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since some moment."""
        ...

    def sleep_until(self, moment_s: float) -> None: ...


class WallClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.perf_counter()

    def sleep_until(self, moment_s: float) -> None:
        time.sleep(max(0.0, moment_s - time.perf_counter()))
