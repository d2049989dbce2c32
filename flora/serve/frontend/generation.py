"""The mailbox between the engine's client and one client request. It never makes the engine's side wait."""

import asyncio
import contextlib
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
        self._has_mail = asyncio.Event()

    async def next(self, timeout_s: float) -> tuple[int, TokenEvent] | None:
        """The next event with the index of its sequence; None if nothing came in time. Raises a sequence's error."""
        if not self._mail:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._has_mail.wait()
        if not self._mail:
            return None
        index, event = self._mail.popleft()
        if not self._mail:
            self._has_mail.clear()
        if isinstance(event, FloraError):
            raise event
        return index, event

    def cancel(self, index: int) -> None:
        """No more tokens of this sequence are wanted."""
        if request_id := self.running.pop(index, None):
            self._forget(request_id, True)

    def close(self) -> None:
        """Cancel what still runs. Safe to call at any time, and again."""
        for index in list(self.running):
            self.cancel(index)

    def put(self, index: int, event: TokenEvent | FloraError) -> None:
        """The engine's side: an event for a sequence, or what ended it."""
        if len(self._mail) >= MAX_UNREAD:
            self.close()
            self._mail.clear()
            event = Overloaded("the client reads more slowly than tokens come", fix="read the stream as it comes")
        self._mail.append((index, event))
        self._has_mail.set()
        ended = isinstance(event, FloraError) or event.finish_reason is not None
        if ended and (request_id := self.running.pop(index, None)):
            self._forget(request_id, False)
