"""A storm of loads as clients of a server feel it: streamed answers, and adapters that are loaded by request."""

import asyncio
import time
from collections.abc import Callable, Sequence

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
    prompts = storm_prompts(storm)
    async with fail_together() as tasks:
        for i, prompt in enumerate(prompts):
            body = stream_body(streams[i % len(streams)], prompt, max_tokens, ignore_eos=True)
            tasks.create_task(drive.stream(i, endpoint.request("POST", "/v1/completions", body)))
        while min(drive.num_pieces) < FIRST_TOKENS:
            await asyncio.sleep(_LOOK_S)
        drive.gaps_s = drive.weather.gaps_before_s
        await asyncio.sleep(storm.window_s)
        drive.gaps_s = drive.weather.gaps_during_s
        start_s = clock()
        drive.end_s = start_s + storm.window_s
        for k, name in enumerate(newcomers[: storm.num_loads]):
            await asyncio.sleep(start_s + k / storm.rate - clock())
            tasks.create_task(drive.load(name))
        await asyncio.sleep(drive.end_s - clock())
        drive.is_over = True  # streams hang up at their next token
    return drive.weather


class _Drive:
    def __init__(self, endpoint: Endpoint, storm: Storm, clock: Callable[[], float]) -> None:
        self.weather = Weather()
        self.num_pieces = [0] * storm.num_streams
        self.gaps_s: list[float] = []  # where gaps go now
        self.is_over = False
        self.end_s = float("inf")
        self._endpoint = endpoint
        self._clock = clock

    async def stream(self, number: int, request: bytes) -> None:
        last_s: float | None = None
        said: Chunk | None = None

        def on_event(data: bytes) -> bool:
            nonlocal last_s, said
            now_s, chunk = self._clock(), decode_chunk(data)
            if any(choice.text for choice in chunk.choices):
                if last_s is not None:
                    self.gaps_s.append(now_s - last_s)
                last_s = now_s
                self.num_pieces[number] += 1
            said = chunk if chunk.error or any(choice.finish_reason for choice in chunk.choices) else said
            return not self.is_over

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
