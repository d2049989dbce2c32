"""The mailbox between the engine's client and one client request. It never makes the engine's side wait."""

import asyncio
from collections import deque
from collections.abc import Callable

from flora.errors import FloraError, Overloaded
from flora.serve.messages import TokenEvent

MAX_UNREAD = 65_536  # events that the reader has not taken yet


class Generation:
    """The mailbox of one client request: the token events of its sequences, in the order they came."""

    def __init__(self, forget: Callable[[str, bool], None]) -> None:
        """forget: is told each request id that is over, and whether the engine must be told to stop"""
        self.running: dict[int, str] = {}  # index of a sequence -> its request id
        self._forget = forget
        self._mail: deque[tuple[int, TokenEvent | FloraError]] = deque()
        self._patience = _Patience()

    async def next(self, timeout_s: float) -> tuple[int, TokenEvent] | None:
        """The next event with the index of its sequence; None if nothing came in time. Raises a sequence's error."""
        if not self._mail:
            await self._patience.wait(timeout_s)
        return self.take()

    def take(self) -> tuple[int, TokenEvent] | None:
        """The next event, if there is one now. Raises a sequence's error."""
        if not self._mail:
            return None
        index, event = self._mail.popleft()
        if isinstance(event, FloraError):
            raise event
        return index, event

    def cancel(self, index: int) -> None:
        """No more tokens of this sequence are wanted."""
        if request_id := self.running.pop(index, None):
            self._forget(request_id, True)

    def close(self) -> None:
        """Cancel what still runs. Safe to call at any time, and again."""
        self._patience.end()
        for index in list(self.running):
            self.cancel(index)

    def put(self, index: int, event: TokenEvent | FloraError) -> None:
        """The engine's side: an event for a sequence, or what ended it."""
        if len(self._mail) >= MAX_UNREAD:
            self.close()
            self._mail.clear()
            event = Overloaded("the client reads more slowly than tokens come", fix="read the stream as it comes")
        self._mail.append((index, event))
        self._patience.wake()
        ended = isinstance(event, FloraError) or event.finish_reason is not None
        if ended and (request_id := self.running.pop(index, None)):
            self._forget(request_id, False)


class _Patience:
    """Waits to be woken, by one timer for many waits: a stream waits once a token, and hardly ever in vain."""

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due_s = 0.0  # by the loop's clock: when the present wait is over

    async def wait(self, timeout_s: float) -> None:
        """Returns once woken or after `timeout_s`. One at a time may wait."""
        loop = asyncio.get_running_loop()
        self._due_s = loop.time() + timeout_s
        if self._timer is not None and self._timer.when() > self._due_s:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = loop.call_at(self._due_s, self._look)
        self._waiter = loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def end(self) -> None:
        """No timer is left behind."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """The timer of some wait has run out: is it this one's?"""
        self._timer = None
        if self._waiter is None:
            return
        loop = asyncio.get_running_loop()
        if loop.time() < self._due_s:
            self._timer = loop.call_at(self._due_s, self._look)
        else:
            self.wake()
