"""The front end's side of the socket, with this test speaking the engine's messages at the other end."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec
import pytest
import zmq
import zmq.asyncio

from flora.errors import BaseMismatch, EngineDead, OutOfPages, Overloaded, ServeError, UsageError
from flora.serve.frontend import client as client_module
from flora.serve.frontend import generation
from flora.serve.frontend.client import EngineClient
from flora.serve.messages import (
    AdapterLoaded,
    AdapterUnloaded,
    Cancel,
    Drain,
    FromEngine,
    FromFrontEnd,
    Hello,
    LoadAdapter,
    Rejected,
    StepEvents,
    Submit,
    TokenEvent,
    UnloadAdapter,
)
from flora.serve.request import AdapterTarget, SamplingParams
from tests.serve.idle_engine import BEAT, READY

PATIENCE_S = 30.0
GREEDY = SamplingParams(max_tokens=4, temperature=0.0)
TARGET = AdapterTarget(serving_digest="sha256:s", version_digest="sha256:v", label="sql")
T = TypeVar("T", bound=FromFrontEnd)


class Peer:
    """The engine's end of the socket."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._socket = socket
        self._client = b""

    async def hear(self, kind: type[T]) -> T:
        self._client, frame = await self._socket.recv_multipart()
        message = msgspec.msgpack.decode(frame, type=FromFrontEnd)
        assert isinstance(message, kind), message
        return message

    async def say(self, message: FromEngine) -> None:
        await self._socket.send_multipart([self._client, msgspec.msgpack.encode(message)])

    async def say_tokens(self, *events: TokenEvent) -> None:
        await self.say(StepEvents(events=events))


@asynccontextmanager
async def connected(**options: Any) -> AsyncIterator[tuple[EngineClient, Peer]]:
    endpoint = f"ipc://@flora-test-{secrets.token_hex(8)}"  # an abstract name: no file to clean up
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.linger = 0
        socket.bind(endpoint)
        client, peer = EngineClient(endpoint, **options), Peer(socket)
        await client.connect()
        try:
            await peer.hear(Hello)
            yield client, peer
        finally:
            await client.close()


def run(test: Callable[[EngineClient, Peer], Awaitable[None]], **options: Any) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S), connected(**options) as (client, peer):
            await test(client, peer)

    asyncio.run(bounded())


def token(request_id: str, *ids: int, end: Any = None) -> TokenEvent:
    return TokenEvent(request_id=request_id, token_ids=ids, finish_reason=end)


def test_tokens_go_to_the_request_they_belong_to():
    async def test(client: EngineClient, peer: Peer) -> None:
        await peer.say(READY)
        assert await client.wait_ready() == READY
        first = client.submit([[1, 2], [3]], [GREEDY, GREEDY], None)
        second = client.submit([[4]], [GREEDY], TARGET)
        submits = [await peer.hear(Submit) for _ in range(3)]
        assert [submit.prompt for submit in submits] == [(1, 2), (3,), (4,)]
        assert [submit.adapter for submit in submits] == [None, None, TARGET]
        a, b, c = (submit.request_id for submit in submits)

        await peer.say_tokens(token(c, 9), token("nobody", 1), token(b, 7), token(a, 8, end="length"))

        assert (await second.next(PATIENCE_S))[1].token_ids == (9,)
        assert [(await first.next(PATIENCE_S))[0] for _ in range(2)] == [1, 0]
        assert await first.next(0.0) is None
        first.close()
        assert (await peer.hear(Cancel)).request_id == b  # a was at its end

    run(test)


def test_a_refusal_is_raised_as_the_error_it_was():
    async def test(client: EngineClient, peer: Peer) -> None:
        for code, kind in (("FL-PAGES", OutOfPages), ("FL-BASE", BaseMismatch), ("FL-NEW", ServeError)):
            running = client.submit([[1]], [GREEDY], None)
            request_id = (await peer.hear(Submit)).request_id
            await peer.say(Rejected(request_id=request_id, code=code, message="no", cause="why", fix="how"))

            with pytest.raises(kind) as caught:
                await running.next(PATIENCE_S)
            assert (caught.value.what, caught.value.cause, caught.value.fix) == ("no", "why", "how")
            running.close()  # nothing is left to cancel: the next message is the next Submit

    run(test)


def test_loading_and_unloading_wait_for_their_answers():
    async def test(client: EngineClient, peer: Peer) -> None:
        loading = asyncio.create_task(client.load_adapter(TARGET, pinned=True))
        asked = await peer.hear(LoadAdapter)
        assert (asked.adapter, asked.pinned) == (TARGET, True)
        await peer.say(AdapterLoaded(request_id=asked.request_id, serving_digest="sha256:s", load_ms=2.5))
        assert (await loading).load_ms == 2.5

        refused = asyncio.create_task(client.load_adapter(TARGET))
        request_id = (await peer.hear(LoadAdapter)).request_id
        await peer.say(Rejected(request_id=request_id, code="FL-PAGES", message="no room"))
        with pytest.raises(OutOfPages):
            await refused

        unloading = asyncio.create_task(client.unload_adapter("sha256:s"))
        request_id = (await peer.hear(UnloadAdapter)).request_id
        await peer.say(AdapterUnloaded(request_id=request_id, serving_digest="sha256:s", was_resident=True))
        assert (await unloading).was_resident
        client.drain()
        await peer.hear(Drain)

    run(test)


def test_a_silent_engine_counts_as_dead_until_it_is_heard_again():
    async def test(client: EngineClient, peer: Peer) -> None:
        await peer.say(READY)
        await peer.say(BEAT)
        await client.wait_ready()
        running = client.submit([[1]], [GREEDY], None)
        loading = asyncio.create_task(client.load_adapter(TARGET))
        request_id = (await peer.hear(Submit)).request_id
        await peer.hear(LoadAdapter)

        with pytest.raises(EngineDead, match="silent"):
            await running.next(PATIENCE_S)
        with pytest.raises(EngineDead):
            await loading
        with pytest.raises(EngineDead):
            client.submit([[1]], [GREEDY], None)
        assert (await peer.hear(Cancel)).request_id == request_id  # it may only have been slow

        await peer.say(BEAT)
        while client.error:
            await asyncio.sleep(0)
        client.submit([[2]], [GREEDY], None)
        assert (await peer.hear(Submit)).prompt == (2,)

    run(test, silence_s=0.3)


def test_an_engine_that_ended_stays_dead():
    async def test(client: EngineClient, peer: Peer) -> None:
        await peer.say(READY)
        await client.wait_ready()
        running = client.submit([[1]], [GREEDY], None)
        await peer.hear(Submit)

        client.engine_ended(EngineDead("the engine process ended: killed by SIGKILL"))
        await peer.say(BEAT)

        with pytest.raises(EngineDead, match="SIGKILL"):
            await running.next(PATIENCE_S)
        while client.num_heartbeats == 0:
            await asyncio.sleep(0)
        assert client.error is not None
        assert "SIGKILL" in (await client.ended()).what

    run(test)


def test_a_client_that_gave_up_does_not_come_back_with_the_next_heartbeat():
    async def test(client: EngineClient, peer: Peer) -> None:
        await peer.say(READY)
        await client.wait_ready()

        client.give_up("the server is shutting down")
        await peer.say(BEAT)

        while client.num_heartbeats == 0:
            await asyncio.sleep(0)
        with pytest.raises(EngineDead, match="shutting down"):
            client.submit([[1]], [GREEDY], None)

    run(test)


def test_an_engine_that_never_was_ready_tells_why():
    async def test(client: EngineClient, peer: Peer) -> None:
        waiting = asyncio.create_task(client.wait_ready())
        client.engine_ended(UsageError("the base is no folder"))

        with pytest.raises(UsageError, match="no folder"):
            await waiting

    run(test)


def test_words_that_cannot_be_read_end_the_requests_and_not_in_silence():
    async def test(client: EngineClient, peer: Peer) -> None:
        running = client.submit([[1]], [GREEDY], None)
        await peer.hear(Submit)

        await peer._socket.send_multipart([peer._client, b"\xc1"])

        with pytest.raises(EngineDead, match="understood"):
            await running.next(PATIENCE_S)

    run(test)


def test_a_client_that_never_reads_is_given_up_and_its_sequences_cancelled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(generation, "MAX_UNREAD", 4)

    async def test(client: EngineClient, peer: Peer) -> None:
        unread = client.submit([[1]], [GREEDY], None)
        request_id = (await peer.hear(Submit)).request_id

        await peer.say_tokens(*[token(request_id, 1)] * 6)

        assert (await peer.hear(Cancel)).request_id == request_id
        with pytest.raises(Overloaded):
            await unread.next(PATIENCE_S)

    run(test)


def test_more_requests_than_the_engine_takes_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(client_module, "MAX_OUTBOX", 8)

    async def test(client: EngineClient, peer: Peer) -> None:
        with pytest.raises(Overloaded):
            client.submit([[1]] * 8, [GREEDY] * 8, None)

    run(test)
