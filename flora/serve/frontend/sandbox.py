"""Renders chat templates in a process of its own: `python -m flora.serve.frontend.sandbox`.

A template comes from a checkpoint or an adapter and is a program. It runs in Jinja's immutable sandbox, with the few
helpers that transformers gives it, in a process that has little memory and ends itself when a rendering takes too long.
Jobs come on stdin and answers go to stdout, each a MessagePack value behind its length in four bytes.
"""

import contextlib
import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.nodes
import msgspec
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 512 << 20  # of address space
FRAME_BYTES = 4  # of a frame's length, big-endian


class Job(msgspec.Struct, frozen=True, kw_only=True):
    template: str
    variables: dict[str, Any]
    seconds: float  # after which the process ends
    max_chars: int  # of the rendered text


class Rendered(msgspec.Struct, frozen=True, kw_only=True):
    text: str | None = None
    error: str | None = None  # why there is no text


def render(job: Job) -> Rendered:
    """The template's text, or why it gave none."""
    pieces: list[str] = []
    size = 0
    try:
        for piece in _compile(job.template).generate(**job.variables):
            size += len(piece)
            if size > job.max_chars:
                return Rendered(error=f"the chat template wrote more than {job.max_chars} characters")
            pieces.append(piece)
    except jinja2.TemplateError as error:
        return Rendered(error=f"the chat template says: {str(error)[:500]}")
    except MemoryError:
        return Rendered(error="the chat template took more memory than it may have")
    except Exception as error:  # whatever a stranger's program raises ends its own rendering only
        return Rendered(error=f"the chat template failed: {type(error).__name__}: {str(error)[:500]}")
    return Rendered(text="".join(pieces))


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks an assistant's words for training; its content is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter would write it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _read_frame(stream: BinaryIO) -> bytes | None:
    length = stream.read(FRAME_BYTES)
    return stream.read(int.from_bytes(length)) if len(length) == FRAME_BYTES else None


def main() -> None:
    """Answer jobs until stdin ends. An overdue job ends the process: SIGALRM is left to its default."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which then closes stdin
    while (frame := _read_frame(sys.stdin.buffer)) is not None:
        job = msgspec.msgpack.decode(frame, type=Job)
        signal.setitimer(signal.ITIMER_REAL, job.seconds)
        answer = msgspec.msgpack.encode(render(job))
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(len(answer).to_bytes(FRAME_BYTES) + answer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the server has gone
        main()
