"""Seconds that each stage of one pair takes: on a GPU by events on the stream in work, else by the clock."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

STAGES = ("read", "copy", "delta", "factorize", "fit")  # of one pair, in this order


class Stopwatch:
    """Of one thread. Stages may come back; their seconds add up until `take`."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._spans: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def by_clock(self, stage: str) -> Iterator[None]:
        """A stage of this thread's own work."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] += time.perf_counter() - start

    @contextmanager
    def on_device(self, stage: str) -> Iterator[None]:
        """A stage of the device's work: on a GPU from the first of its operations to the end of the last, gaps too."""
        if not self._is_cuda:
            with self.by_clock(stage):
                yield
            return
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        try:
            yield
        finally:
            end.record()
            self._spans.append((stage, start, end))

    def take(self) -> dict[str, float]:
        """The stages since the last call, which may wait for the device to end them; and begins anew."""
        for stage, start, end in self._spans:
            end.synchronize()
            self._seconds[stage] += start.elapsed_time(end) / 1e3
        taken = dict(self._seconds)
        self._seconds.clear()
        self._spans.clear()
        return taken
