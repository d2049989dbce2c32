"""A refusal as it came from the engine, made an exception again: the class that its code names."""

from collections.abc import Iterator

from flora.errors import FloraError, ServeError
from flora.serve.messages import Rejected


def refusal(message: Rejected) -> FloraError:
    """The error that the engine met. One with a code that nobody here knows is a ServeError."""
    kind = _BY_CODE.get(message.code, ServeError)
    return kind(message.message, cause=message.cause, fix=message.fix)


def _all_kinds(kind: type[FloraError]) -> Iterator[type[FloraError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _all_kinds(below)


_BY_CODE = {kind.code: kind for kind in _all_kinds(FloraError)}
