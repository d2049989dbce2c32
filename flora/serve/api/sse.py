"""An answer as server-sent events: chunks as they come, comments while nothing comes, an error or an end, `[DONE]`."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from flora.serve.api.errors import envelope, log_failure
from flora.serve.api.shapes import Shape, usage_object
from flora.serve.frontend.answer import Piece
from flora.serve.frontend.run import Run

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"

_MOST_AT_ONCE = 256  # events in one write


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


async def stream_events(
    run: Run,
    shape: Shape,
    found: tuple[int, Piece] | None,
    *,
    keepalive_s: float,
    includes_usage: bool,
    continues_usage: bool,
) -> AsyncIterator[bytes]:
    """The body of a streamed answer. `found`: what was taken from the run already; None: nothing came for a while.

    What has come meanwhile goes out in one write: where tokens come faster than writes can be made, a write costs more
    than the events in it.
    """

    def written(chunks: list[dict[str, Any]]) -> bytes:
        if continues_usage:
            chunks = [chunk | {"usage": usage_object(run.usage)} for chunk in chunks]
        elif includes_usage:
            chunks = [chunk | {"usage": None} for chunk in chunks]
        return b"".join(map(event, chunks))

    opened: set[int] = set()
    ready: list[bytes] = []  # to be sent next
    try:
        while True:
            if found is None:
                ready.append(KEEP_ALIVE)
            while found is not None:
                index, piece = found
                if index not in opened:
                    opened.add(index)
                    ready.append(written(shape.opening(index)))
                if not piece.is_empty:
                    ready.append(written(shape.chunks(index, piece)))
                found = None if run.is_finished or len(ready) >= _MOST_AT_ONCE else run.take()
            if run.is_finished:
                break
            if body := b"".join(ready):
                yield body
            ready.clear()
            found = await run.next(keepalive_s)
    except Exception as error:  # the status line is gone: the error is the last thing in the stream
        log_failure(error)
        ready.append(event(envelope(error)))
    else:
        if includes_usage:
            ready.append(event(shape.closing(run.usage)))
    yield b"".join([*ready, DONE])


class EventStream(StreamingResponse):
    """Sends the events, and tells when that is over: all sent, or the client gone."""

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[], None], headers: dict[str, str]) -> None:
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"} | headers,
        )
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()
