"""A running Flora server, as the command line and the demo talk to it: OpenAI's routes over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, NotRequired, Self, TypedDict, TypeVar

import msgspec

from flora.errors import AdapterNotFound, AuthError, FloraError, RemoteError, ServeError

if TYPE_CHECKING:
    import httpx2

DEFAULT_URL = "http://127.0.0.1:8000"
_CONNECT_TIMEOUT_S = 5.0
_LOOK_THERE = "the server's own log has more"
_READ_TIMEOUT_S = 300.0  # between two pieces of an answer; a server that loads or queues may be silent for a while


_T = TypeVar("_T")


class Details(TypedDict, total=False):
    """What only a Flora server says of an adapter."""

    serving_digest: str
    rank: int
    bytes: int
    residency: str


class Card(TypedDict):
    """One model of a list."""

    id: str
    parent: NotRequired[str | None]
    root: NotRequired[str | None]
    flora: NotRequired[Details | None]


class Resident(TypedDict):
    """One adapter that is loaded."""

    label: str
    serving_digest: str
    rank: int
    bytes: int
    residency: str


class _Held(TypedDict):
    resident: NotRequired[list[Resident]]


class _Page(TypedDict):
    data: list[Card]
    has_more: NotRequired[bool]
    last_id: NotRequired[str | None]
    flora: NotRequired[_Held | None]


class _Loaded(TypedDict):
    ref: str
    serving_digest: str


class Loading(TypedDict):
    flora: _Loaded
    load_ms: float


class _Unloaded(TypedDict):
    ref: str


class Unloading(TypedDict):
    flora: _Unloaded
    was_resident: bool


class _Delta(TypedDict):
    content: NotRequired[str | None]


class _Choice(TypedDict, total=False):
    text: str | None
    delta: _Delta | None
    finish_reason: str | None


class _Chunk(TypedDict, total=False):
    choices: list[_Choice] | None
    usage: dict[str, Any] | None
    error: Any


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of a streamed answer; the last piece has a finish reason, and one after it the usage."""

    text: str
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None


class Server:
    """A connection to one server. Every method raises RemoteError if nothing answers, and what the server refuses."""

    def __init__(self, url: str = DEFAULT_URL, api_key: str | None = None) -> None:
        import httpx2

        self.url = url.rstrip("/").removesuffix("/v1")  # other clients of OpenAI's are given it with its version
        self._client = httpx2.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx2.Timeout(_READ_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
            limits=httpx2.Limits(max_connections=None),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def complete(self, model: str, prompt: str, **options: Any) -> Iterator[Piece]:
        """The completion of `prompt`, as it comes."""
        body = {"model": model, "prompt": prompt, **options}
        for choice, usage in self._stream("/v1/completions", body):
            yield Piece(choice.get("text") or "", choice.get("finish_reason"), usage)

    def chat(self, model: str, messages: list[dict[str, str]], **options: Any) -> Iterator[Piece]:
        """The answer to a conversation, as it comes."""
        body = {"model": model, "messages": messages, **options}
        for choice, usage in self._stream("/v1/chat/completions", body):
            yield Piece((choice.get("delta") or {}).get("content") or "", choice.get("finish_reason"), usage)

    def models(self) -> Iterator[Card]:
        """Every model card: the base, then its adapters by name."""
        after: str | None = None
        while True:
            page = self._page({"after": after} if after else {})
            yield from page["data"]
            if not page.get("has_more"):
                return
            after = page.get("last_id")
            if after is None:
                raise self._no_server("its list of models goes on, and it does not say where")

    def resident(self) -> list[Resident]:
        """Every adapter that is loaded, by the name that it was loaded by."""
        return (self._page({"limit": 1}).get("flora") or {}).get("resident") or []

    def load(self, ref: str, *, is_pinned: bool = False) -> Loading:
        body: dict[str, Any] = {"lora_name": ref, "lora_path": ref}
        body |= {"pinned": True} if is_pinned else {}
        return self._json(Loading, "POST", "/v1/load_lora_adapter", json=body)

    def unload(self, ref: str) -> Unloading:
        """ref: a reference, or the serving digest of what is loaded"""
        return self._json(Unloading, "POST", "/v1/unload_lora_adapter", json={"lora_name": ref})

    def _page(self, params: dict[str, Any]) -> _Page:
        return self._json(_Page, "GET", "/v1/models", params=params)

    def _json(self, kind: type[_T], method: str, path: str, **arguments: Any) -> _T:
        with self._reached():
            response = self._client.request(method, path, **arguments)
        if not response.is_success:
            raise self._refused(response.status_code, response.content)
        try:
            return msgspec.convert(response.json(), kind)
        except msgspec.ValidationError as error:
            raise self._no_server(f"{path} answers otherwise: {error}") from error
        except ValueError as error:
            raise self._no_server(f"{path} answers with {_media_type(response)}") from error

    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[tuple[_Choice, dict[str, Any] | None]]:
        """(choice, usage) of each chunk of a streamed answer."""
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        with self._reached(), self._client.stream("POST", path, json=body) as response:
            if not response.is_success:
                raise self._refused(response.status_code, response.read())
            if _media_type(response) != "text/event-stream":
                raise self._no_server(f"{path} answers with {_media_type(response)}")
            for chunk in self._events(response):
                choices = chunk.get("choices") or [_Choice()]
                yield choices[0], chunk.get("usage")

    def _events(self, response: httpx2.Response) -> Iterator[_Chunk]:
        """The chunk of each server-sent event, up to [DONE]. Raises RemoteError where that does not come."""
        for line in response.iter_lines():
            if line.startswith("data:"):
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                yield self._event(data)
        raise RemoteError(
            f"the answer of {self.url} broke off",
            cause="its stream ended without [DONE]",
            fix=f"ask again; {_LOOK_THERE}",
        )

    def _event(self, data: str) -> _Chunk:
        try:
            event = msgspec.json.decode(data, type=_Chunk)
        except msgspec.DecodeError as error:
            raise self._no_server(f"its stream has events that are no chunks: {error}") from error
        if "error" in event:
            raise _refusal(500, data.encode())
        return event

    def _refused(self, status: int, body: bytes) -> FloraError:
        """What the server refuses; without its envelope it is another program's word, unless that asks for a key."""
        if _told(body) is None and status < 500 and status not in (401, 403):
            return self._no_server(f"what is there answers with status {status}")
        return _refusal(status, body)

    def _no_server(self, cause: str) -> RemoteError:
        return RemoteError(
            f"no Flora server answers at {self.url}",
            cause=cause,
            fix="start one with `flora serve`, or name another with --server URL",
        )

    @contextmanager
    def _reached(self) -> Iterator[None]:
        import httpx2

        try:
            yield
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            raise self._no_server(str(error) or type(error).__name__) from error


def _refusal(status: int, body: bytes) -> FloraError:
    """The error that an answer's envelope tells of, its message in its three parts again."""
    message = _told(body)
    if message is None:
        said = body.decode(errors="replace").strip()
        message = f"status {status}" if said.startswith("<") or not said else said[:300]
    message, _, fix = message.partition(". Fix: ")
    what, _, cause = message.partition(". Cause: ")
    if status in (401, 403):
        return AuthError(what, cause=cause or None, fix="set FLORA_API_KEY to one of the server's keys")
    if status == 404:
        return AdapterNotFound(what, cause=cause or None, fix=fix or "`flora ps --all` lists what the server has")
    return ServeError(
        f"the server refused: {what}", cause=cause or None, fix=fix or (_LOOK_THERE if status >= 500 else None)
    )


def _told(body: bytes) -> str | None:
    """The message in OpenAI's envelope; None where there is none."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return None


def _media_type(response: httpx2.Response) -> str:
    return response.headers.get("content-type", "").partition(";")[0].strip() or "something of no type"
