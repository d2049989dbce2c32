"""Ranges of the arena for loads, in the order in which they ask: at once where there is a gap, or as room is made."""

import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock

from flora.errors import ServeError
from flora.serve.engine.loading.arena import Arena

_NUM_RECENT = 16  # claims whose mean size tells what the next ones will need


@dataclass(frozen=True, slots=True, eq=False)
class _Claim:
    """A load that waits for a range."""

    num_bytes: int
    start: Future[int] = field(default_factory=Future)


class Claims:
    """Between the threads that load, which take ranges, and the engine's, which alone can make room for them."""

    def __init__(self, arena: Arena, num_ahead: int, on_waiting: Callable[[], None]) -> None:
        """num_ahead   expected loads that get room ahead, at most
        on_waiting  is called from a thread that loads and now waits for the engine's to call `settle`
        """
        self._arena = arena
        self._num_ahead = num_ahead
        self._on_waiting = on_waiting
        self._lock = Lock()
        self._waiting: list[_Claim] = []
        self._is_closed = False
        self._num_expected = 0  # loads that have no range yet
        self._recent: deque[int] = deque(maxlen=_NUM_RECENT)  # bytes of claims

    def expect(self) -> None:
        """One more load will take a range, or else `forgo` it."""
        with self._lock:
            self._num_expected += 1

    def forgo(self) -> None:
        """A load has failed before it had a range."""
        with self._lock:
            self._num_expected -= 1

    def take(self, num_bytes: int) -> int:
        """Where the range starts, once there is one. Raises ServeError if that will never be."""
        if num_bytes > self._arena.num_bytes:
            raise ServeError(
                f"an adapter of {num_bytes} bytes does not fit the {self._arena.num_bytes} bytes of the host cache",
                fix="start the server with a larger --host-cache",
            )
        with self._lock:
            if self._is_closed:
                raise _closed()
            self._recent.append(num_bytes)
            start = None if self._waiting else self._arena.allocate(num_bytes)  # nobody overtakes those who wait
            if start is not None:
                self._num_expected -= 1
                return start
            claim = _Claim(num_bytes)
            self._waiting.append(claim)
        self._on_waiting()
        return claim.start.result()

    def settle(self, make_room: Callable[[int], bool]) -> None:
        """Gives ranges to those who wait, in order, as far as room can be made; on the engine's thread.

        What is free stays for the first that needs more. If nobody needs more, the next few loads that are expected get
        room ahead, each of the recent ones' mean size; one that is larger, or finds only scattered gaps, still waits.
        """
        with self._lock:
            waiting = list(self._waiting)
        for claim in waiting:
            start = self._arena.allocate(claim.num_bytes)
            while start is None and make_room(claim.num_bytes):
                start = self._arena.allocate(claim.num_bytes)
            if start is None:
                return
            with self._lock:
                self._waiting.remove(claim)
                self._num_expected -= 1
            claim.start.set_result(start)
        with self._lock:
            mean = math.ceil(sum(self._recent) / max(len(self._recent), 1))
            missing = min(self._num_expected, self._num_ahead) * mean - self._arena.num_free
        if missing > 0:
            make_room(missing)

    def close(self) -> None:
        """Nobody gets a range any more, whoever waits for one included."""
        with self._lock:
            self._is_closed = True
            waiting, self._waiting = self._waiting, []
        for claim in waiting:
            claim.start.set_exception(_closed())


def _closed() -> ServeError:
    return ServeError("the engine is shutting down", fix="send the request to another server")
