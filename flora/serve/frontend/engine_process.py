"""The engine's process: started, listened to, and ended for certain."""

import asyncio
import contextlib
import logging
import os
import re
import sys
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from flora.child_process import how_it_ended
from flora.errors import EngineDead, FloraError, ServeError
from flora.serve.config import EngineConfig, encode_engine_config
from flora.serve.frontend.refusals import error_of_code

_LAST_LINES = 40  # of its log, for the message when it dies
_LAST_WORDS_S = 1.0  # for what it wrote before its end to arrive
_MAX_SOCKET_PATH = 100  # bytes; the kernel takes 107
_LOG_LINE = re.compile(r"\S+ \S+ (DEBUG|INFO|WARNING|ERROR|CRITICAL) (\S+) (.*)")
_FLORA_ERROR = re.compile(r"error\[(FL-[A-Z]+)\]: (.*)")


@dataclass(frozen=True, slots=True)
class Line:
    """One line that an engine wrote."""

    text: str
    is_ordinary: bool  # of the log, and below ERROR: what went on, with names of its users in it


class EngineProcess:
    """One engine. Use `started_engine`, which also ends it."""

    def __init__(self, process: asyncio.subprocess.Process, log: asyncio.StreamReader, endpoint: str) -> None:
        self.endpoint = endpoint
        self._process = process
        self._last_lines: deque[Line] = deque(maxlen=_LAST_LINES)
        self._relay = asyncio.create_task(self._relay_log(log))

    async def ended(self) -> FloraError:
        """Waits for its end; what it died of, as far as it said so."""
        code = await self._process.wait()
        await asyncio.wait({self._relay}, timeout=_LAST_WORDS_S)
        return last_error(self._last_lines) or EngineDead(
            f"the engine process ended: {how_it_ended(code)}",
            cause=last_words(self._last_lines),
            fix="restart the server",
        )

    async def end(self, patience_s: float = 0.0) -> None:
        """Returns once it is gone: by itself within `patience_s`, or by force."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._process.wait()), patience_s)
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()
        await asyncio.wait({self._relay}, timeout=_LAST_WORDS_S)
        self._relay.cancel()

    async def _relay_log(self, log: asyncio.StreamReader) -> None:
        """Its stderr into this process's log, line by line."""
        level, name = logging.INFO, "flora.serve.engine"
        while True:
            try:
                line = (await log.readline()).decode(errors="replace")
            except ValueError:  # longer than the reader's limit, which has dropped it
                continue
            if not line:
                return
            text = line.rstrip("\n")
            match = _LOG_LINE.fullmatch(text)
            if match:
                level, name, text = logging.getLevelNamesMapping()[match[1]], match[2], match[3]
            self._last_lines.append(Line(text, is_ordinary=bool(match) and level < logging.ERROR))
            logging.getLogger(name).log(level, "%s", text)


@contextlib.asynccontextmanager
async def started_engine(config: EngineConfig, folder: Path) -> AsyncIterator[EngineProcess]:
    """An engine with its configuration and its socket in `folder`, which only this user may enter; gone at the end."""
    socket = folder / "engine"
    if len(os.fsencode(socket)) > _MAX_SOCKET_PATH:
        raise ServeError(
            f"the path of the engine's socket is too long: {socket}",
            cause=f"it may have {_MAX_SOCKET_PATH} bytes",
            fix="set TMPDIR to a shorter path",
        )
    config_file = folder / "engine.json"
    config_file.write_bytes(encode_engine_config(config))
    endpoint = f"ipc://{socket}"
    async with _pipe() as (log, log_fd):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "flora.serve.engine", "--config", str(config_file), "--endpoint", endpoint),
            *("--parent", str(os.getpid())),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=log_fd,
        )
        os.close(log_fd)
        engine = EngineProcess(process, log, endpoint)
        try:
            yield engine
        finally:
            await engine.end()


@contextlib.asynccontextmanager
async def _pipe() -> AsyncIterator[tuple[asyncio.StreamReader, int]]:
    """A reader, and the end to write to. asyncio's own pipe would keep `wait` from returning while a process of the
    engine's outlives it.
    """
    read_fd, write_fd = os.pipe()
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_fd, "rb")
    )
    try:
        yield reader, write_fd
    finally:
        transport.close()


def last_error(lines: Iterable[Line]) -> FloraError | None:
    """The last FloraError that was printed, made an exception again."""
    texts = [line.text for line in lines]
    starts = [index for index, text in enumerate(texts) if _FLORA_ERROR.match(text)]
    if not starts:
        return None
    head, *rest = texts[starts[-1] :]
    match = _FLORA_ERROR.match(head)
    assert match is not None
    more = {key: text for line in rest for key, _, text in [line.partition(": ")] if key in ("cause", "fix")}
    return error_of_code(match[1], match[2], cause=more.get("cause"), fix=more.get("fix"))


def last_words(lines: Sequence[Line]) -> str | None:
    """The last line that is no detail of a traceback; None where the engine ended amid ordinary work."""
    unusual = takewhile(lambda line: not line.is_ordinary, reversed(lines))
    return next((line.text for line in unusual if line.text and not line.text.startswith(" ")), None)
