"""The front end's side of the engine: requests out, tokens in, and the knowledge whether anyone is there.

Everything runs on one event loop. Messages go out through a bounded queue, so giving a request up never waits. What
comes in goes into the mailbox of its request, so a client that reads slowly holds up nobody else.
"""

import asyncio
import contextlib
import itertools
import logging
import secrets
import time
from collections.abc import Sequence

import msgspec
import zmq
import zmq.asyncio

from flora.errors import EngineDead, FloraError, Overloaded
from flora.serve.frontend.generation import Generation
from flora.serve.frontend.refusals import refusal
from flora.serve.messages import (
    AdapterLoaded,
    AdapterUnloaded,
    Cancel,
    Drain,
    FromEngine,
    FromFrontEnd,
    Heartbeat,
    Hello,
    LoadAdapter,
    Ready,
    Rejected,
    StepEvents,
    Submit,
    TokenEvent,
    UnloadAdapter,
)
from flora.serve.request import AdapterTarget, SamplingParams

logger = logging.getLogger(__name__)

MAX_OUTBOX = 65_536  # messages that the engine has not taken yet
_CHECK_S = 0.25


class EngineClient:
    """One engine, reached over ZeroMQ. Its process is someone else's: `engine_ended` tells of its end."""

    def __init__(self, endpoint: str, *, silence_s: float = 10.0) -> None:
        """silence_s: without a heartbeat for this long, the engine counts as dead until the next one"""
        self.ready: Ready | None = None
        self.heartbeat: Heartbeat | None = None
        self.num_heartbeats = 0
        self._endpoint = endpoint
        self._silence_s = silence_s
        self._dead: EngineDead | None = None
        self._ended: FloraError | None = None
        self._is_given_up = False
        self._last_heard = time.monotonic()
        self._is_ready = asyncio.Event()
        self._has_ended = asyncio.Event()
        self._ids = itertools.count()
        self._generations: dict[str, tuple[Generation, int]] = {}
        self._answers: dict[str, asyncio.Future[AdapterLoaded | AdapterUnloaded]] = {}
        self._outbox: asyncio.Queue[FromFrontEnd] = asyncio.Queue(MAX_OUTBOX)
        self._tasks: list[asyncio.Task[None]] = []

    async def connect(self) -> None:
        """Start talking; `wait_ready` says when the engine answers."""
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, secrets.token_bytes(16))
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(self._endpoint)
        self._outbox.put_nowait(Hello())
        self._tasks = [asyncio.create_task(work) for work in (self._send(), self._receive(), self._watch())]
        for task in self._tasks:
            task.add_done_callback(self._work_ended)

    async def wait_ready(self) -> Ready:
        """The engine's constants, once it can serve. Raises EngineDead if it ends before."""
        await self._is_ready.wait()
        if self.ready is None:
            raise self._ended or EngineDead("the engine is gone")
        return self.ready

    async def ended(self) -> EngineDead:
        """Waits until no request can ever be served again; returns why."""
        await self._has_ended.wait()
        assert self._dead is not None
        return _again(self._dead)

    async def close(self) -> None:
        self.give_up("the server is shutting down")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.close()
        self._context.term()

    @property
    def error(self) -> EngineDead | None:
        """Why requests cannot be served now; None if they can."""
        return self._dead

    @property
    def silent_s(self) -> float:
        """Seconds since the engine last said anything."""
        return time.monotonic() - self._last_heard

    def engine_ended(self, error: FloraError) -> None:
        """The engine's process is gone for good: every waiting request gets an error, and every later one.

        error: what it died of; `wait_ready` raises it where the engine never was ready
        """
        self._ended = error
        self._fail(error if isinstance(error, EngineDead) else EngineDead(error.what, cause=error.cause, fix=error.fix))
        self._is_ready.set()
        self._has_ended.set()

    def give_up(self, why: str) -> None:
        """Ends every waiting request with an error, and every later one, for good."""
        self._is_given_up = True
        self._fail(EngineDead(why))

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[SamplingParams],
        adapter: AdapterTarget | None,
    ) -> Generation:
        """Ask for one sequence per prompt and sampling; their tokens come through the one Generation.

        Raises EngineDead, Overloaded.
        """
        self._check(room_for=2 * len(prompts))
        generation = Generation(self._forget)
        for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
            request_id = f"r{next(self._ids)}"
            generation.running[index] = request_id
            self._generations[request_id] = (generation, index)
            self._outbox.put_nowait(
                Submit(request_id=request_id, prompt=tuple(prompt), sampling=sampling, adapter=adapter)
            )
        return generation

    async def load_adapter(self, adapter: AdapterTarget, *, pinned: bool = False) -> AdapterLoaded:
        """Make it resident. Raises the error of a refusal."""
        request_id = f"r{next(self._ids)}"
        answer = await self._call(request_id, LoadAdapter(request_id=request_id, adapter=adapter, pinned=pinned))
        assert isinstance(answer, AdapterLoaded)
        return answer

    async def unload_adapter(self, serving_digest: str) -> AdapterUnloaded:
        """Give its pages back once nothing uses it. Raises the error of a refusal."""
        request_id = f"r{next(self._ids)}"
        answer = await self._call(request_id, UnloadAdapter(request_id=request_id, serving_digest=serving_digest))
        assert isinstance(answer, AdapterUnloaded)
        return answer

    def drain(self) -> None:
        """Tell the engine to end once its running requests are done."""
        with contextlib.suppress(asyncio.QueueFull):
            self._outbox.put_nowait(Drain())

    async def _call(self, request_id: str, message: FromFrontEnd) -> AdapterLoaded | AdapterUnloaded:
        self._check(room_for=1)
        future = self._answers[request_id] = asyncio.get_running_loop().create_future()
        self._outbox.put_nowait(message)
        try:
            return await future
        finally:
            self._answers.pop(request_id, None)

    def _check(self, room_for: int) -> None:
        if self._dead:
            raise _again(self._dead)
        if self._outbox.qsize() + room_for > MAX_OUTBOX:
            raise Overloaded("the engine takes requests more slowly than they come", fix="try again later")

    def _forget(self, request_id: str, cancel: bool) -> None:
        """No more of this sequence is wanted; `cancel` it if the engine may still be at it."""
        if self._generations.pop(request_id, None) and cancel:
            try:
                self._outbox.put_nowait(Cancel(request_id=request_id))
            except asyncio.QueueFull:
                logger.error("cancel lost request=%s outbox=%d", request_id, MAX_OUTBOX)

    async def _send(self) -> None:
        encoder = msgspec.msgpack.Encoder()
        while True:
            await self._socket.send(encoder.encode(await self._outbox.get()))

    async def _receive(self) -> None:
        decoder = msgspec.msgpack.Decoder(FromEngine)
        while True:
            frame = await self._socket.recv()
            self._last_heard = time.monotonic()
            self._take(decoder.decode(frame))

    def _take(self, message: FromEngine) -> None:
        match message:
            case StepEvents(events=events):
                for event in events:
                    self._deliver(event.request_id, event)
            case Rejected(request_id=request_id):
                if future := self._answers.get(request_id):
                    _settle(future, error=refusal(message))
                self._deliver(request_id, refusal(message))
            case AdapterLoaded(request_id=request_id) | AdapterUnloaded(request_id=request_id):
                if future := self._answers.get(request_id):
                    _settle(future, answer=message)
            case Ready():
                self.ready = message
                self._is_ready.set()
            case Heartbeat():
                self.heartbeat = message
                self.num_heartbeats += 1
                if self._dead and not (self._ended or self._is_given_up):
                    logger.warning("engine is heard again")
                    self._dead = None

    def _work_ended(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()):
            logger.error("talking to the engine failed", exc_info=error)
            self.engine_ended(EngineDead("the engine cannot be understood", cause=repr(error)))

    def _deliver(self, request_id: str, event: TokenEvent | FloraError) -> None:
        generation, index = self._generations.get(request_id, (None, 0))
        if generation is not None:  # else it was cancelled, and the engine has not heard of that yet
            generation.put(index, event)

    async def _watch(self) -> None:
        """Notice silence. A second look tells an engine that is silent from a loop that was busy elsewhere."""
        while True:
            await asyncio.sleep(_CHECK_S)
            if self.ready is None or self._dead or self.silent_s < self._silence_s:
                continue
            await asyncio.sleep(_CHECK_S)
            if self.silent_s >= self._silence_s:
                logger.error("engine silent silent_s=%.1f", self.silent_s)
                self._fail(EngineDead(f"the engine has been silent for {self.silent_s:.1f} s"))

    def _fail(self, error: EngineDead) -> None:
        self._dead = error
        for request_id, (generation, index) in list(self._generations.items()):
            self._forget(request_id, cancel=True)  # the engine may only have been slow
            generation.put(index, _again(error))
        for future in self._answers.values():
            _settle(future, error=_again(error))


def _again(error: EngineDead) -> EngineDead:
    """The same error for one more request: an exception that many tasks raise would collect their tracebacks."""
    return EngineDead(error.what, cause=error.cause, fix=error.fix)


def _settle(
    future: "asyncio.Future[AdapterLoaded | AdapterUnloaded]",
    *,
    answer: AdapterLoaded | AdapterUnloaded | None = None,
    error: FloraError | None = None,
) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    elif answer is not None:
        future.set_result(answer)
