"""How much a request may send, in which form, and how long it may take. uvicorn itself bounds little of it."""

import asyncio

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flora.serve.api.errors import plain_response
from flora.serve.config import ServeConfig

_MAX_HEADERS = 200
_CLOSE = {"connection": "close"}  # what is left of the body is not read


class BodyLimits:
    """Counts a body as it comes, whatever it declared; only JSON, uncompressed."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self._app = app
        self._max_bytes = config.max_body_bytes
        self._timeout_s = config.body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        refusal = self._refusal(scope["method"], headers)
        if refusal is not None:
            status, message, code = refusal
            await plain_response(status, message, code=code, headers=_CLOSE)(scope, receive, send)
            return
        await self._app(scope, self._bounded(receive), send)

    def _refusal(self, method: str, headers: Headers) -> tuple[int, str, str] | None:
        if len(headers) > _MAX_HEADERS:
            return 431, f"a request may have {_MAX_HEADERS} headers", "too_many_headers"
        if "content-length" in headers and "transfer-encoding" in headers:
            return 400, "Content-Length and Transfer-Encoding exclude each other", "ambiguous_length"
        length = headers.get("content-length", "0")
        if len(length) > 12 or (length.isdigit() and int(length) > self._max_bytes):
            return 413, f"the body may have {self._max_bytes} bytes", "body_too_large"
        if headers.get("content-encoding", "identity") != "identity":
            return 415, "send the body uncompressed", "unsupported_encoding"
        if method == "POST" and headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            # a form of another site's page cannot send this type unasked
            return 415, "send JSON, with the header Content-Type: application/json", "unsupported_media_type"
        return None

    def _bounded(self, receive: Receive) -> Receive:
        left = self._max_bytes
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        is_complete = False

        async def bounded() -> Message:
            nonlocal left, is_complete
            if is_complete:
                return await receive()  # waits for the client to leave: for as long as the answer takes
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body took longer than {self._timeout_s:g} s", _CLOSE) from None
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"the body may have {self._max_bytes} bytes", _CLOSE)
            is_complete = not message.get("more_body", False)
            return message

        return bounded
