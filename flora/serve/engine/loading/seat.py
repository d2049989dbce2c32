"""The place of a loader process: when one ends that should not, another one follows it.

Except after several in a row that ended before their first answer. What ends those ends the next one as well, and a
place that fills itself for ever would be a machine that starts processes and does nothing else.
"""

import logging
from collections.abc import Callable
from threading import Lock

from flora.errors import ServeError
from flora.serve.engine.loading.child import Child

logger = logging.getLogger(__name__)

MAX_USELESS = 3  # processes in a row that end before they have answered anything


class Seat:
    """One thread fills it and asks who sits there; `end` is any thread's."""

    def __init__(self, start: Callable[[], Child]) -> None:
        self._start = start
        self._child = start()
        self._is_buried = False
        self._num_useless = 0
        self._is_ending = False
        self._lock = Lock()  # no process is started behind the back of whoever ends this

    @property
    def is_given_up(self) -> bool:
        return self._num_useless >= MAX_USELESS

    @property
    def child(self) -> Child:
        """Who sits here. Raises ServeError once that is nobody for good."""
        if self.is_given_up:
            raise ServeError(
                "no loader process is left",
                cause=f"{MAX_USELESS} in a row ended before they had answered anything",
                fix="see in the server's log what ended them, mend that, and restart the server",
            )
        return self._child

    @property
    def is_filled(self) -> bool:
        return self._child.is_alive

    def fill(self) -> None:
        """Another process in the place of one that has ended, unless this seat is given up."""
        with self._lock:
            if self._child.is_alive or self._is_ending or self.is_given_up:
                return
            if not self._is_buried:
                self._bury()
            if self.is_given_up:
                logger.error("loader processes given up: %d in a row were of no use", MAX_USELESS)
            else:
                self._follow()

    def end(self) -> None:
        """Ends whoever sits here, and whatever is asked of it. Nobody follows."""
        with self._lock:
            self._is_ending = True
            self._child.end()

    def close(self) -> None:
        """Once nobody asks any more."""
        self._child.close()

    def _bury(self) -> None:
        logger.error("loader process ended pid=%d: %s", self._child.pid, self._child.bury())
        self._num_useless = 0 if self._child.has_answered else self._num_useless + 1
        self._is_buried = True

    def _follow(self) -> None:
        try:
            self._child = self._start()
        except OSError:  # the system has no process left, or no memory: as good as one that ends at once
            self._num_useless += 1
            logger.exception("loader process not started")
        else:
            self._is_buried = False
            logger.info("loader process started pid=%d", self._child.pid)
