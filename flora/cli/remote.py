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

        self.url = url.rstrip("/")
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
        return self._json("POST", "/v1/load_lora_adapter", json=body | ({"pinned": True} if is_pinned else {}))

    def unload(self, ref: str) -> dict[str, Any]:
        """ref: a reference, or the serving digest of what is loaded"""
        return self._json("POST", "/v1/unload_lora_adapter", json={"lora_name": ref})

    def _json(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        with self._reached():
            response = self._client.request(method, path, **arguments)
        if not response.is_success:
            raise _refusal(response.status_code, response.content)
        return response.json()

    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
        """(choice, usage) of each chunk of a streamed answer."""
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        with self._reached(), self._client.stream("POST", path, json=body) as response:
            if not response.is_success:
                raise _refusal(response.status_code, response.read())
            for chunk in _events(response):
                if "error" in chunk:
                    raise _refusal(500, json.dumps(chunk).encode())
                choices = chunk.get("choices") or [{}]
                yield choices[0], chunk.get("usage")

    @contextmanager
    def _reached(self) -> Iterator[None]:
        import httpx2

        try:
            yield
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            raise RemoteError(
                f"no Flora server answers at {self.url}",
                cause=str(error) or type(error).__name__,
                fix="start one with `flora serve`, or name another with --server URL",
            ) from error


def _events(response: httpx2.Response) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event, up to [DONE]."""
    for line in response.iter_lines():
        if line.startswith("data:"):
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            yield json.loads(data)


def _refusal(status: int, body: bytes) -> FloraError:
    """The error that an answer's envelope tells of, its message in its three parts again."""
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = body.decode(errors="replace")[:300] or f"status {status}"
    message, _, fix = message.partition(". Fix: ")
    what, _, cause = message.partition(". Cause: ")
    if status in (401, 403):
        return AuthError(what, cause=cause or None, fix="set FLORA_API_KEY to one of the server's keys")
    if status == 404:
        return AdapterNotFound(what, cause=cause or None, fix=fix or "`flora ps --all` lists what the server has")
    return ServeError(
        f"the server refused: {what}", cause=cause or None, fix=fix or (_LOOK_THERE if status >= 500 else None)
    )
