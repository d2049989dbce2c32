"""A storm of loads as clients of a server feel it: streamed answers, and adapters that are loaded by request."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import msgspec

from flora.bench.http_stream import Endpoint
from flora.bench.over_http import Chunk, decode_chunk, fail_together, problem_of, stream_body
from flora.bench.storm import FIRST_TOKENS, Storm, Weather, storm_prompts
from flora.errors import CheckFailed

_LOOK_S = 0.01


async def drive_storm_http(
    endpoint: Endpoint,
    storm: Storm,
    streams: Sequence[str],
    newcomers: Sequence[str],
    *,
    max_tokens: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Weather:
    """As storm.drive_storm, by names: of the models that streams ask for in turn, and of the adapters to load.

    Gaps are between two reads of a stream that brought text. Raises CheckFailed, RemoteError.
    """
    drive = _Drive(endpoint, storm, clock)
    bodies = [
        stream_body(streams[i % len(streams)], prompt, max_tokens, ignore_eos=True)
        for i, prompt in enumerate(storm_prompts(storm))
    ]
    async with drive.streams(bodies, drive.weather.gaps_before_s):
        await asyncio.sleep(storm.window_s)
    async with drive.streams(bodies, drive.weather.gaps_during_s) as tasks:
        start_s = clock()
        drive.end_s = start_s + storm.window_s
        for k, name in enumerate(newcomers[: storm.num_loads]):
            await asyncio.sleep(start_s + k / storm.rate - clock())
            tasks.create_task(drive.load(name))
        await asyncio.sleep(drive.end_s - clock())
    return drive.weather


class _Drive:
    def __init__(self, endpoint: Endpoint, storm: Storm, clock: Callable[[], float]) -> None:
        self.weather = Weather()
        self.end_s = float("inf")
        self._num_pieces: list[int] = []  # of each stream
        self._gaps_s: list[float] = []  # where gaps go now
        self._is_over = False
        self._endpoint = endpoint
        self._clock = clock

    @asynccontextmanager
    async def streams(self, bodies: Sequence[bytes], gaps_s: list[float]) -> AsyncIterator[asyncio.TaskGroup]:
        """Streams of these requests. Within, each has had its first tokens, and gaps are gathered; they end with it."""
        self._num_pieces, self._gaps_s, self._is_over = [0] * len(bodies), [], False
        async with fail_together() as tasks:
            for i, body in enumerate(bodies):
                tasks.create_task(self._stream(i, self._endpoint.request("POST", "/v1/completions", body)))
            while min(self._num_pieces) < FIRST_TOKENS:
                await asyncio.sleep(_LOOK_S)
            self._gaps_s = gaps_s
            yield tasks
            self._is_over = True  # streams hang up at their next token

    async def _stream(self, number: int, request: bytes) -> None:
        last_s: float | None = None
        said: Chunk | None = None

        def on_event(data: bytes) -> bool:
            nonlocal last_s, said
            now_s, chunk = self._clock(), decode_chunk(data)
            if any(choice.text for choice in chunk.choices):
                if last_s is not None:
                    self._gaps_s.append(now_s - last_s)
                last_s = now_s
                self._num_pieces[number] += 1
            said = chunk if chunk.error or any(choice.finish_reason for choice in chunk.choices) else said
            return not self._is_over

        answer = await self._endpoint.send(request, on_event)
        if not answer.hung_up:
            problem = (said and said.error) or problem_of(answer.body)
            raise CheckFailed(
                f"stream {number} ended before the storm did: status {answer.status} {problem.message}".rstrip(),
                fix="give longer streams (--max-len), or a shorter storm (--storm-seconds)",
            )

    async def load(self, name: str) -> None:
        body = msgspec.json.encode({"lora_name": name, "lora_path": name})
        asked_s = self._clock()
        answer = await self._endpoint.send(self._endpoint.request("POST", "/v1/load_lora_adapter", body))
        if answer.status != 200:
            raise CheckFailed(f"the server refused to load {name}: {problem_of(answer.body).message}")
        now_s = self._clock()
        if now_s <= self.end_s:
            self.weather.load_ms.append((now_s - asked_s) * 1000)
