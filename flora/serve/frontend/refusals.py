"""An error of the engine, made an exception again here: the class that its code names."""

from collections.abc import Iterator

from flora.errors import FloraError, ServeError
from flora.serve.messages import Rejected


def refusal(message: Rejected) -> FloraError:
    """Why the engine did not take a request."""
    return error_of_code(message.code, message.message, cause=message.cause, fix=message.fix)


def error_of_code(code: str, what: str, *, cause: str | None, fix: str | None) -> FloraError:
    """The error with that code; a ServeError where nobody here knows it."""
    return _BY_CODE.get(code, ServeError)(what, cause=cause, fix=fix)


def _all_kinds(kind: type[FloraError]) -> Iterator[type[FloraError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _all_kinds(below)


_BY_CODE = {kind.code: kind for kind in _all_kinds(FloraError)}
