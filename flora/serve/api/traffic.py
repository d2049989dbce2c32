"""Every request on its way in and out: an id to find it by, a count for draining, a line in the metrics."""

import re
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flora.serve.api.errors import RETRY_AFTER_S, plain_response
from flora.serve.api.state import ServerState

_ALWAYS_OPEN = frozenset({"/health", "/metrics", "/version"})  # also while the server drains
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:/+=-]{1,128}")


class Traffic:
    """The outermost layer."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        status = 500
        request_id = _request_id(Headers(scope=scope))

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if self._state.is_draining:
                    headers["connection"] = "close"
            await send(message)

        self._state.request_begins()
        try:
            if self._state.is_draining and scope["path"] not in _ALWAYS_OPEN:
                refusal = plain_response(
                    503,
                    "the server is shutting down",
                    code="shutting_down",
                    headers={"retry-after": str(RETRY_AFTER_S)},
                )
                await refusal(scope, receive, counted)
            else:
                await self._app(scope, receive, counted)
        finally:
            self._state.request_ends()
            self._state.metrics.note_response(_route(scope), status)


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid4().hex


def _route(scope: Scope) -> str:
    """The route's pattern, so that strangers' paths do not become labels."""
    return getattr(scope.get("route"), "path", "none")
