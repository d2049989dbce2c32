"""uvicorn's HTTP/1.1 protocol with deadlines: for the head of a request, and for a client that reads nothing."""

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)


class TimedProtocol(H11Protocol):
    """Closes a connection that sends no whole request head in time, or takes nothing of its answer for too long."""

    head_timeout_s: float = 10.0
    write_timeout_s: float = 60.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer = _Timer(self, self.head_timeout_s, "sends no request")
        self._write_timer = _Timer(self, self.write_timeout_s, "reads nothing of its answer")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._time_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._time_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._write_timer.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._head_timer.stop()
        self._write_timer.stop()

    def _time_head(self) -> None:
        """The clock runs from the connection or the last answer until a request's head is whole."""
        is_waiting = self.cycle is None or self.cycle.response_complete
        if is_waiting and not self.transport.is_closing():
            self._head_timer.start()
        else:
            self._head_timer.stop()


class _Timer:
    """Drops the connection when it runs out."""

    def __init__(self, protocol: TimedProtocol, seconds: float, why: str) -> None:
        self._protocol = protocol
        self._seconds = seconds
        self._why = why
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Does nothing if it runs already."""
        if self._handle is None:
            self._handle = self._protocol.loop.call_later(self._seconds, self._run_out)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _run_out(self) -> None:
        logger.info("connection dropped client=%s: it %s", self._protocol.client, self._why)
        self._protocol.transport.abort()


def timed_protocol(*, head_timeout_s: float, write_timeout_s: float) -> type[TimedProtocol]:
    """The protocol class with these deadlines; uvicorn makes one object of it for each connection."""
    return type(
        "TimedProtocol", (TimedProtocol,), {"head_timeout_s": head_timeout_s, "write_timeout_s": write_timeout_s}
    )
