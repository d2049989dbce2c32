"""The one table from an error's class to its HTTP status and OpenAI's error envelope.

    {"error": {"message": …, "type": …, "param": …, "code": …}}

Answers hold no file path and no stack trace: what an error says about this machine goes to the log.
"""

import logging
import re
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from flora import errors

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1
_ROUTE = r"/v1/(?:chat/completions|completions|models|load_lora_adapter|unload_lora_adapter)(?!\.?[\w/-])"  # our own
_PATH = re.compile(rf"(?<![\w.:/])(?!{_ROUTE})(?:file://)?/(?:[\w.@+~-]+/)+[\w.@+~-]*")
_MAX_CHARS = 1000


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    type: str = "invalid_request_error"
    code: str | None = None  # None: the error's own, FL-…
    param: str | None = None
    retry: bool = False  # the same request may succeed later


_UNKNOWN_MODEL = _Answer(404, code="model_not_found", param="model")
_UNUSABLE_ADAPTER = _Answer(422, param="model")
_SERVER = _Answer(500, type="server_error")

_TABLE: dict[type[errors.FloraError], _Answer] = {
    errors.AdapterNotFound: _UNKNOWN_MODEL,
    errors.NotFound: _Answer(404),
    errors.NameInvalid: _Answer(400),
    errors.BaseMismatch: _Answer(400, param="model"),
    errors.AdapterInvalid: _UNUSABLE_ADAPTER,
    errors.CheckpointError: _UNUSABLE_ADAPTER,  # the base's own are met before the server listens
    errors.AuthError: _Answer(401, type="authentication_error", code="invalid_api_key"),
    errors.PromptTooLong: _Answer(400, code="context_length_exceeded"),
    errors.RequestInvalid: _Answer(400, code="invalid_value"),
    errors.OutOfPages: _Answer(503, type="server_error", retry=True),
    errors.Overloaded: _Answer(503, type="server_error", code="overloaded", retry=True),
    errors.DeadlineMissed: _Answer(503, type="server_error", code="first_token_too_late", retry=True),
    errors.EngineDead: _Answer(503, type="server_error", retry=True),
    errors.FloraError: _SERVER,
}


def status_of(error: BaseException) -> int:
    return _answer_of(error).status


def envelope(error: BaseException) -> dict[str, Any]:
    """The body of an error answer; also what a stream that has begun sends instead of its next chunk."""
    answer = _answer_of(error)
    if not isinstance(error, errors.FloraError):
        return error_body(
            "the server met an error of its own; its log has more", type=answer.type, code="internal_error"
        )
    message = error.what
    if answer.status < 500 or answer.retry:
        message += f". Cause: {error.cause}" if error.cause else ""
        message += f". Fix: {error.fix}" if error.fix else ""
    return error_body(
        message,
        type=answer.type,
        param=error.values.get("param", answer.param),
        code=error.values.get("api_code") or answer.code or error.code,
    )


def error_body(message: str, *, type: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": _without_paths(message)[:_MAX_CHARS], "type": type, "param": param, "code": code}}


def error_response(error: BaseException) -> JSONResponse:
    """The HTTP answer to a request that failed before its first byte of answer."""
    answer = _answer_of(error)
    if answer.status >= 500:
        log_failure(error)
    headers = {"retry-after": str(RETRY_AFTER_S)} if answer.retry else {}
    if answer.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(envelope(error), answer.status, headers=headers)


def plain_response(status: int, message: str, *, code: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An answer for what HTTP itself says: no such route, body too large, …"""
    type = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse(error_body(message, type=type, code=code), status, headers=headers)


def log_failure(error: BaseException) -> None:
    """What the client is not told."""
    if isinstance(error, errors.FloraError):
        logger.error("request failed code=%s: %s cause=%s", error.code, error.what, error.cause)
    else:
        logger.error("request failed", exc_info=error)


def _answer_of(error: BaseException) -> _Answer:
    return next((_TABLE[kind] for kind in type(error).__mro__ if kind in _TABLE), _SERVER)


def _without_paths(text: str) -> str:
    return _PATH.sub("(a path)", text)
