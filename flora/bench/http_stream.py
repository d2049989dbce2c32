"""HTTP/1.1 as a load generator needs it: one request a connection, and an answer's events as they arrive.

A general client spends more time on an event than a fast server does, and the benchmark would measure the client. This
one reads what servers of OpenAI's API send: a length or chunks, one JSON body or server-sent events.
"""

import asyncio
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from flora.errors import RemoteError, UsageError

OnEvent = Callable[[bytes], bool]  # takes the data of one event; False hangs up

_STATUS_LINE = re.compile(rb"HTTP/1\.[01] [0-9]{3}")
_PATIENCE_S = 900.0  # for one whole answer: a request may wait for many others


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes  # empty where the answer was events
    hung_up: bool = False  # by us


class Endpoint:
    """Where a server answers."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{url!r} is no address of a server", fix="give it as http://127.0.0.1:8000")
        self.url = url
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._head = f"Host: {parts.netloc}\r\nConnection: close\r\nAccept: */*\r\n"
        if api_key:
            self._head += f"Authorization: Bearer {api_key}\r\n"

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The bytes of a request; made before the clock starts where time counts."""
        kind = "Content-Type: application/json\r\n" if body else ""
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._head}{kind}Content-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    async def send(self, request: bytes, on_event: OnEvent | None = None) -> Answer:
        """The answer, once it is whole. Raises RemoteError where none comes."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Answer] = loop.create_future()
        try:
            transport, _ = await loop.create_connection(
                lambda: _Reader(request, on_event, done), self._host, self._port, ssl=self._ssl
            )
        except OSError as error:
            raise self._unreachable(str(error)) from error
        try:
            return await asyncio.wait_for(done, _PATIENCE_S)
        except (TimeoutError, ConnectionError, ValueError) as error:
            raise self._unreachable(str(error) or f"no whole answer within {_PATIENCE_S:.0f} s") from error
        finally:
            transport.close()

    def _unreachable(self, cause: str) -> RemoteError:
        return RemoteError(f"no answer from {self.url}", cause=cause, fix="start the server, or correct --url")


class _Reader(asyncio.Protocol):
    """Sends one request and reads its answer. Every read of the socket is taken apart at once."""

    def __init__(self, request: bytes, on_event: OnEvent | None, done: "asyncio.Future[Answer]") -> None:
        self._request = request
        self._on_event = on_event
        self._done = done
        self._head = b""
        self._status = 0
        self._chunks: ChunkedBody | None = None
        self._length: int | None = None  # of the body, where the head says so
        self._events: EventSplitter | None = None
        self._body = bytearray()
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: Any) -> None:  # a WriteTransport, which uvloop's is not by class
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        try:
            self._read(data)
        except Exception as error:  # not HTTP, or not as we read it: whoever waits must hear of it
            self._fail(error)

    def connection_lost(self, error: Exception | None) -> None:
        is_whole = self._status and self._chunks is None and self._length is None
        if is_whole and error is None:  # a body without a length ends with its connection
            self._finish()
        else:
            self._fail(error or ConnectionError("the connection ended within the answer"))

    def _read(self, data: bytes) -> None:
        if not self._status:
            self._head += data
            head, mark, data = self._head.partition(b"\r\n\r\n")
            if not mark:
                return
            self._begin(head)
        if self._chunks is not None:
            data = self._chunks.feed(data)
        if self._events is None:
            self._body += data
        elif not self._tell(self._events.feed(data)):
            self._finish(hung_up=True)
            return
        is_last_chunk = self._chunks is not None and self._chunks.is_over
        if is_last_chunk or (self._length is not None and len(self._body) >= self._length):
            self._finish()

    def _begin(self, head: bytes) -> None:
        if not _STATUS_LINE.match(head):
            raise ValueError(f"this is not HTTP: {head[:60]!r}")
        first, *lines = head.split(b"\r\n")
        fields = {name.strip().lower(): value.strip().lower() for name, _, value in (x.partition(b":") for x in lines)}
        self._status = int(first.split(b" ")[1])
        if fields.get(b"transfer-encoding") == b"chunked":
            self._chunks = ChunkedBody()
        elif b"content-length" in fields:
            self._length = int(fields[b"content-length"])
        if self._on_event and self._status == 200 and fields.get(b"content-type", b"").startswith(b"text/event-stream"):
            self._events = EventSplitter()

    def _tell(self, events: list[bytes]) -> bool:
        assert self._on_event
        return all(self._on_event(data) for data in events if data != b"[DONE]")

    def _finish(self, *, hung_up: bool = False) -> None:
        if not self._done.done():
            self._done.set_result(Answer(self._status, bytes(self._body), hung_up))
        self._close()

    def _fail(self, error: Exception) -> None:
        if not self._done.done():
            self._done.set_exception(error)
        self._close()

    def _close(self) -> None:
        if self._transport:
            self._transport.close()


class ChunkedBody:
    """Takes the frames off a chunked body, however the reads cut it."""

    def __init__(self) -> None:
        self.is_over = False
        self._left = 0  # bytes of the present chunk and of the line end behind it
        self._waiting = b""  # a piece of a size line

    def feed(self, data: bytes) -> bytes:
        """The body's bytes among these. Raises ValueError where a size is none."""
        data, body, start = self._waiting + data, bytearray(), 0
        self._waiting = b""
        while start < len(data) and not self.is_over:
            if self._left:
                taken = data[start : start + self._left]
                body += taken[: max(0, self._left - 2)]
                self._left -= len(taken)
                start += len(taken)
                continue
            end = data.find(b"\r\n", start)
            if end < 0:
                self._waiting = data[start:]
                break
            size = int(data[start:end].partition(b";")[0], 16)
            self.is_over, self._left, start = size == 0, size + 2, end + 2
        return bytes(body)


class EventSplitter:
    """Server-sent events, however the reads cut them."""

    def __init__(self) -> None:
        self._waiting = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The data of every event that is complete now; comments have none."""
        *events, self._waiting = (self._waiting + data).replace(b"\r\n", b"\n").split(b"\n\n")
        return [joined for event in events if (joined := _data_of(event))]


def _data_of(event: bytes) -> bytes:
    return b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
