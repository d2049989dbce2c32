"""A running Flora server, as the command line and the demo talk to it: OpenAI's routes over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from flora.errors import AdapterNotFound, AuthError, FloraError, RemoteError, ServeError

if TYPE_CHECKING:
    import httpx2

DEFAULT_URL = "http://127.0.0.1:8000"
_CONNECT_TIMEOUT_S = 5.0
_LOOK_THERE = "the server's own log has more"
_READ_TIMEOUT_S = 300.0  # between two pieces of an answer; a server that loads or queues may be silent for a while


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

    def models(self) -> Iterator[dict[str, Any]]:
        """Every model card: the base, then its adapters by name."""
        after: str | None = None
        while True:
            page = self._json("GET", "/v1/models", params={"after": after} if after else {})
            if not isinstance(page.get("data"), list):
                raise self._no_server("it lists no models")
            yield from page["data"]
            if not page.get("has_more"):
                return
            after = page["last_id"]

    def resident(self) -> list[dict[str, Any]]:
        """Every adapter that is loaded, by the name that it was loaded by."""
        page = self._json("GET", "/v1/models", params={"limit": 1})
        return (page.get("flora") or {}).get("resident") or []

    def load(self, ref: str, *, is_pinned: bool = False) -> dict[str, Any]:
        body: dict[str, Any] = {"lora_name": ref, "lora_path": ref}
        return self._change("/v1/load_lora_adapter", body | ({"pinned": True} if is_pinned else {}))

    def unload(self, ref: str) -> dict[str, Any]:
        """ref: a reference, or the serving digest of what is loaded"""
        return self._change("/v1/unload_lora_adapter", {"lora_name": ref})

    def _change(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self._json("POST", path, json=body)
        if not isinstance(answer.get("flora"), dict):
            raise self._no_server(f"{path} answers without saying what it did")
        return answer

    def _json(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        with self._reached():
            response = self._client.request(method, path, **arguments)
        if not response.is_success:
            raise self._refused(response.status_code, response.content)
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self._no_server(f"{path} answers with {_media_type(response)}")
        return answer

    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
        """(choice, usage) of each chunk of a streamed answer."""
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        with self._reached(), self._client.stream("POST", path, json=body) as response:
            if not response.is_success:
                raise self._refused(response.status_code, response.read())
            if _media_type(response) != "text/event-stream":
                raise self._no_server(f"{path} answers with {_media_type(response)}")
            for chunk in self._events(response):
                if "error" in chunk:
                    raise _refusal(500, json.dumps(chunk).encode())
                choices = chunk.get("choices") or [{}]
                yield choices[0], chunk.get("usage")

    def _events(self, response: httpx2.Response) -> Iterator[dict[str, Any]]:
        """The JSON of each server-sent event, up to [DONE]. Raises RemoteError where that does not come."""
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

    def _event(self, data: str) -> dict[str, Any]:
        try:
            event = json.loads(data)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise self._no_server("its stream has events that are no JSON objects")
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
