"""Requests to a server of OpenAI's API: streamed completions by many clients at once, prompts as token ids."""

import asyncio
import contextlib
import resource
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from flora.bench.asks import Ask
from flora.bench.http_stream import Endpoint
from flora.bench.timeline import Timeline
from flora.errors import RemoteError

_TOO_LATE = "first_token_too_late"  # Flora's code for a request that early abort gave up

_SOCKETS = 16_384
_GREEDY: Mapping[str, float] = {"temperature": 0.0}

_T = TypeVar("_T")


class Choice(msgspec.Struct):
    text: str | None = None
    finish_reason: str | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Problem(msgspec.Struct):
    message: str = ""
    code: str | int | None = None


class Chunk(msgspec.Struct):
    """What a benchmark needs of a completion's chunk, or of an error in its place."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Problem | None = None


decode_chunk = msgspec.json.Decoder(Chunk).decode


def run(work: Coroutine[Any, Any, _T]) -> _T:
    """Runs it on uvloop where that is installed, with as many sockets as the system allows: each client is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _SOCKETS:
        most = _SOCKETS if hard == resource.RLIM_INFINITY else min(hard, _SOCKETS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    factory = None
    with contextlib.suppress(ImportError):
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work)


async def drive_server(
    endpoint: Endpoint,
    asks: Sequence[Ask],
    model_of: Callable[[int | None], str],
    *,
    clients: int | None = None,
    ignore_eos: bool = True,
) -> list[Timeline]:
    """Sends each request when it is due, streams every answer, and hangs up where the ask says so.

    asks        in order of arrival
    model_of    the server's name of an adapter number; of None, the base's
    clients     at most so many at once: a request that is due waits for one to be free
    ignore_eos  a field beyond OpenAI's, which Flora, vLLM and SGLang know
    Raises RemoteError where the server cannot be reached.
    """
    requests = [
        endpoint.request(
            "POST",
            "/v1/completions",
            stream_body(
                model_of(ask.adapter), ask.prompt, ask.num_tokens, ignore_eos=ignore_eos, draw=_draw_of(ask, i)
            ),
        )
        for i, ask in enumerate(asks)
    ]
    timelines = [Timeline() for _ in asks]
    free = asyncio.Semaphore(clients or len(asks))
    start_s = time.perf_counter()

    async def one(number: int) -> None:
        try:
            await _complete(endpoint, requests[number], asks[number], timelines[number], start_s)
        finally:
            free.release()

    async with fail_together() as tasks:
        for number, ask in enumerate(asks):
            wait_s = start_s + ask.due_s - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            await free.acquire()
            tasks.create_task(one(number))
    return timelines


@contextlib.asynccontextmanager
async def fail_together() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group whose first error is the one that is raised."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except BaseExceptionGroup as group:
        raise next(_leaves(group)) from None


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


async def _complete(endpoint: Endpoint, request: bytes, ask: Ask, timeline: Timeline, start_s: float) -> None:
    problem: Problem | None = None
    finish_reason: str | None = None

    def on_event(data: bytes) -> bool:
        nonlocal problem, finish_reason
        now_s = time.perf_counter() - start_s
        chunk = decode_chunk(data)
        for choice in chunk.choices:
            finish_reason = choice.finish_reason or finish_reason
            if choice.text:
                timeline.piece_s.append(now_s)
        if chunk.usage:
            timeline.num_tokens, timeline.prompt_tokens = chunk.usage.completion_tokens, chunk.usage.prompt_tokens
        problem = chunk.error or problem
        return ask.cancel_after is None or len(timeline.piece_s) < ask.cancel_after

    timeline.sent_s = time.perf_counter() - start_s
    answer = await endpoint.send(request, on_event)
    now_s = time.perf_counter() - start_s
    if answer.hung_up:
        timeline.num_tokens = len(timeline.piece_s)
        timeline.end("cancelled", now_s)
    elif answer.status != 200 or problem:
        problem = problem or problem_of(answer.body)
        message = f"status {answer.status}: {problem.message}"
        timeline.end("aborted" if problem.code == _TOO_LATE else "failed", now_s, message)
    elif finish_reason in ("length", "stop"):
        timeline.end("length", now_s)
    else:
        timeline.end("failed", now_s, f"the answer ended with finish_reason {finish_reason!r}")


def _draw_of(ask: Ask, seed: int) -> Mapping[str, float]:
    """The fields that say how its tokens are drawn."""
    if ask.temperature == 0.0:
        return _GREEDY
    return {"temperature": ask.temperature, "top_p": ask.top_p, "seed": seed}


def stream_body(
    model: str,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    ignore_eos: bool,
    draw: Mapping[str, float] = _GREEDY,
) -> bytes:
    """The body of a streamed completion that ends with its usage; greedy unless told otherwise."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        **draw,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return msgspec.json.encode(body | ({"ignore_eos": True} if ignore_eos else {}))


def problem_of(body: bytes) -> Problem:
    """What an answer that is no success says."""
    try:
        found = decode_chunk(body).error
    except msgspec.MsgspecError:
        found = None
    return found or Problem(body.decode(errors="replace")[:300])


async def get_json(endpoint: Endpoint, path: str) -> Any:
    """The JSON at this path. Raises RemoteError."""
    answer = await endpoint.send(endpoint.request("GET", path))
    if answer.status != 200:
        raise RemoteError(
            f"{endpoint.url}{path} answers with status {answer.status}", cause=problem_of(answer.body).message
        )
    return msgspec.json.decode(answer.body)


async def get_metrics(endpoint: Endpoint) -> Mapping[str, list[tuple[dict[str, str], float]]]:
    """Every sample of /metrics: name -> labels and value; empty where the server has none."""
    from prometheus_client.parser import text_string_to_metric_families

    answer = await endpoint.send(endpoint.request("GET", "/metrics"))
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    if answer.status == 200:
        for family in text_string_to_metric_families(answer.body.decode()):
            for sample in family.samples:
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found
