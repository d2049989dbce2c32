"""What the start of an engine waits for: a log line as each part begins, and how long each one took."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


class Stages:
    """The parts of one start, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}  # name -> what it took

    @contextmanager
    def begin(self, name: str, what: str) -> Iterator[None]:
        """Times a part. what  it does, for whoever waits; a part that fails is not counted."""
        logger.info("%s", what)
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
