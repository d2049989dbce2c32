"""Messages to prompt text: the chat template of the adapter or the base, rendered in processes that can be killed."""

import asyncio
import contextlib
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from flora.errors import CheckpointError, RequestInvalid
from flora.serve.frontend.sandbox import FRAME_BYTES, Job, Rendered
from flora.serve.frontend.tokenizer import read_json

MAX_TEMPLATE_BYTES = 1 << 20
MAX_RENDERED_CHARS = 8 << 20
_GRACE_S = 5.0  # beyond a job's own time, for a process that the machine has no time for


def base_template(folder: Path) -> str | None:
    """The chat template that a checkpoint folder carries; None if it has none. Raises CheckpointError."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return decode_template(file.read_bytes(), where=f"{folder.name}/{file.name}")
    template = (read_json(folder / "tokenizer_config.json") or {}).get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return decode_template(template.encode(), where=folder.name) if isinstance(template, str) else None


def decode_template(data: bytes, *, where: str) -> str:
    """The template's text, if it is not too large. Raises CheckpointError."""
    if len(data) > MAX_TEMPLATE_BYTES:
        raise CheckpointError(f"the chat template of {where} has {len(data)} bytes; {MAX_TEMPLATE_BYTES} are allowed")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"the chat template of {where} is not UTF-8", cause=str(error)) from error


class TemplateRenderer:
    """Renders in up to `max_workers` processes, started when first needed. One template may hold half of them, so that
    a slow one leaves room for the others.
    """

    def __init__(self, *, max_workers: int = 4, seconds: float = 3.0) -> None:
        self._seconds = seconds
        self._workers = asyncio.Semaphore(max_workers)
        self._per_template = max(1, max_workers // 2)
        self._turns: dict[str, asyncio.Semaphore] = {}
        self._interested: Counter[str] = Counter()
        self._idle: list[asyncio.subprocess.Process] = []

    async def render(self, template: str, variables: dict[str, Any]) -> str:
        """The rendered text. Raises RequestInvalid when the template refuses the messages or passes its limits."""
        job = Job(template=template, variables=variables, seconds=self._seconds, max_chars=MAX_RENDERED_CHARS)
        async with self._turn(template), self._workers:
            answer = await self._ask(job)
        if answer.text is None:
            raise RequestInvalid(answer.error or "the chat template gave no text", param="messages")
        return answer.text

    async def close(self) -> None:
        """End the idle processes; call it when nothing renders any more."""
        while self._idle:
            await _end(self._idle.pop())

    @contextlib.asynccontextmanager
    async def _turn(self, template: str) -> AsyncIterator[None]:
        self._interested[template] += 1
        try:
            async with self._turns.setdefault(template, asyncio.Semaphore(self._per_template)):
                yield
        finally:
            self._interested[template] -= 1
            if not self._interested[template]:
                del self._interested[template], self._turns[template]

    async def _ask(self, job: Job) -> Rendered:
        worker = self._idle.pop() if self._idle else await _start()
        try:
            answer = await asyncio.wait_for(_exchange(worker, msgspec.msgpack.encode(job)), job.seconds + _GRACE_S)
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            await _end(worker)
            return Rendered(error=f"the chat template took longer than {job.seconds:g} s")
        except asyncio.CancelledError:  # the request was given up
            await _end(worker)
            raise
        self._idle.append(worker)
        return msgspec.msgpack.decode(answer, type=Rendered)


async def _start() -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "flora.serve.frontend.sandbox",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )


async def _exchange(worker: asyncio.subprocess.Process, job: bytes) -> bytes:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(len(job).to_bytes(FRAME_BYTES) + job)
    await worker.stdin.drain()
    length = await worker.stdout.readexactly(FRAME_BYTES)
    return await worker.stdout.readexactly(int.from_bytes(length))


async def _end(worker: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        worker.kill()
    await worker.wait()
