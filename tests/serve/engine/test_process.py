"""The engine as front ends meet it: a process at the other end of a socket."""

import gc
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest
import zmq

from flora.serve.config import EngineConfig, encode_engine_config
from flora.serve.engine.garbage import keep_collections_short
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
from tests.serve.engine.adapters import random_adapter
from tests.serve.engine.worlds import World

PATIENCE_S = 120.0
ENDLESS = SamplingParams(max_tokens=400, temperature=0.0)
BRIEF = SamplingParams(max_tokens=3, temperature=0.0)
PARENT = """
import os, subprocess, sys
engine = subprocess.Popen([sys.executable, *sys.argv[1:], "--parent", str(os.getpid())])
print(engine.pid, flush=True)
{then}
"""
DEAF = """
from flora.serve.engine.__main__ import main
from flora.serve.engine.mailroom import Mailroom

def fail(*_):
    raise RuntimeError("nobody foresaw this")

Mailroom._sort = fail
main()
"""

Message = TypeVar("Message")


class FrontEnd:
    """A DEALER that speaks the engine's messages."""

    def __init__(self, endpoint: str) -> None:
        self._socket = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, secrets.token_bytes(8))
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, int(PATIENCE_S * 1000))
        self._socket.connect(endpoint)

    def send(self, message: FromFrontEnd) -> None:
        self._socket.send(msgspec.msgpack.encode(message))

    def send_raw(self, frame: bytes) -> None:
        self._socket.send(frame)

    def receive(self) -> FromEngine:
        return msgspec.msgpack.decode(self._socket.recv(), type=FromEngine)

    def expect(self, kind: type[Message]) -> Message:
        """The next message of this kind; others are passed over."""
        while not isinstance(message := self.receive(), kind):
            pass
        return message

    def events(self, request_id: str) -> Iterator[TokenEvent]:
        """The events of one request, to its end."""
        while True:
            for event in self.expect(StepEvents).events:
                if event.request_id == request_id:
                    yield event
                    if event.finish_reason:
                        return

    def tokens(self, request_id: str) -> list[int]:
        return [token for event in self.events(request_id) for token in event.token_ids]

    def close(self) -> None:
        self._socket.close()


@contextmanager
def running_engine(world: World) -> Iterator[tuple[str, subprocess.Popen]]:
    """The endpoint of an engine process, and the process."""
    with tempfile.TemporaryDirectory(prefix="flora-") as folder:  # short: an ipc path has at most 107 bytes
        endpoint = f"ipc://{folder}/engine"
        arguments = [*engine_arguments(world, Path(folder), endpoint), "--parent", str(os.getpid())]
        process = subprocess.Popen([sys.executable, *arguments])
        try:
            yield endpoint, process
        finally:
            process.kill()
            process.wait()


def engine_arguments(world: World, folder: Path, endpoint: str) -> list[str]:
    """All but whose child it is."""
    config = EngineConfig(
        base=world.base,
        registry=str(world.home / "registry"),
        cache_dir=world.home / "cache",
        pool_bytes=16 << 20,
        num_threads=1,
    )
    file = folder / "engine.json"
    file.write_bytes(encode_engine_config(config))
    return ["-m", "flora.serve.engine", "--config", str(file), "--endpoint", endpoint]


@pytest.fixture(scope="module")
def served(bases, tmp_path_factory) -> Iterator[tuple[str, AdapterTarget]]:
    """One engine process for the tests that leave it running, and an adapter of its registry."""
    world = World(bases("llama"), tmp_path_factory.mktemp("served"))
    target = world.add(random_adapter(world.config, seed=1), "a")
    with running_engine(world) as (endpoint, _):
        yield endpoint, target


@pytest.fixture
def front_end(served) -> Iterator[FrontEnd]:
    front_end = FrontEnd(served[0])
    yield front_end
    front_end.close()


def test_hello_is_answered_by_ready_and_heartbeats_follow(front_end):
    front_end.send(Hello())

    ready = front_end.expect(Ready)
    assert ready.vocab_size == 199
    assert ready.max_context == 512
    assert ready.kernels["paged_attention"] == "cpu"
    assert front_end.expect(Heartbeat).running == 0
    assert front_end.expect(Heartbeat).free_pages == ready.num_pages - 1


def test_base_and_adapter_stream_side_by_side(front_end, served):
    front_end.send(Submit(request_id="base", prompt=(1, 2, 3), sampling=BRIEF))
    front_end.send(Submit(request_id="adapted", prompt=(1, 2, 3), sampling=BRIEF, adapter=served[1]))

    ended = {}
    while len(ended) < 2:
        for event in front_end.expect(StepEvents).events:
            if event.finish_reason:
                ended[event.request_id] = event.finish_reason
    assert ended == {"base": "length", "adapted": "length"}


def test_two_front_ends_may_use_the_same_request_id(served, front_end):
    other = FrontEnd(served[0])
    front_end.send(Submit(request_id="r", prompt=(1, 2, 3), sampling=BRIEF))
    other.send(Submit(request_id="r", prompt=(4, 5, 6), sampling=BRIEF))

    assert len(front_end.tokens("r")) == len(other.tokens("r")) == 3
    other.close()


def test_a_cancelled_request_ends_and_gives_its_pages_back(front_end):
    front_end.send(Hello())
    num_pages = front_end.expect(Ready).num_pages
    front_end.send(Submit(request_id="long", prompt=(1, 2, 3), sampling=ENDLESS))
    events = front_end.events("long")
    next(events)

    front_end.send(Cancel(request_id="long"))

    assert [event.finish_reason for event in events][-1] == "cancelled"
    while (beat := front_end.expect(Heartbeat)).running:
        pass
    assert beat.kv_pages == 0
    assert beat.free_pages + beat.adapter_pages == num_pages - 1


def test_an_adapter_is_loaded_and_unloaded_on_demand(front_end, served):
    target = served[1]
    front_end.send(LoadAdapter(request_id="load", adapter=target))
    assert front_end.expect(AdapterLoaded).serving_digest == target.serving_digest

    front_end.send(UnloadAdapter(request_id="unload", serving_digest=target.serving_digest))
    assert front_end.expect(AdapterUnloaded).was_resident


def test_whoever_hears_of_a_load_has_seen_it_already(front_end, served):
    """The heartbeat before the answer shows the change: nobody asks again to find out that it is so."""
    _, target = served

    def last_beat_before(kind: type) -> set[str]:
        beats = []
        while not isinstance(message := front_end.receive(), kind):
            if isinstance(message, Heartbeat):
                beats.append({resident.serving_digest for resident in message.resident})
        return beats[-1]

    front_end.send(LoadAdapter(request_id="load", adapter=target))
    assert target.serving_digest in last_beat_before(AdapterLoaded)
    front_end.send(UnloadAdapter(request_id="unload", serving_digest=target.serving_digest))
    assert target.serving_digest not in last_beat_before(AdapterUnloaded)


def test_what_cannot_be_served_is_refused_with_code_and_reason(front_end):
    front_end.send(Submit(request_id="long", prompt=(1,) * 512, sampling=BRIEF))
    assert front_end.expect(Rejected).code == "FL-CONTEXT"

    front_end.send(Submit(request_id="foreign", prompt=(1, 199), sampling=BRIEF))
    assert front_end.expect(Rejected).code == "FL-REQUEST"

    unknown = AdapterTarget(serving_digest="sha256:" + "0" * 64, version_digest="sha256:" + "0" * 64, label="x")
    front_end.send(Submit(request_id="unknown", prompt=(1,), sampling=BRIEF, adapter=unknown))
    assert front_end.expect(Rejected).code == "FL-ADAPTER"


def test_a_frame_that_is_no_message_harms_nobody(front_end):
    front_end.send_raw(b"\x93not a message")
    front_end.send_raw(msgspec.msgpack.encode(Cancel(request_id="abcd")).replace(b"abcd", b"\xff\xfe\xfd\xfc"))
    front_end.send(Submit(request_id="after", prompt=(1, 2, 3), sampling=BRIEF))

    assert len(front_end.tokens("after")) == 3


def test_requests_of_a_front_end_that_is_gone_end(served, front_end):
    """Left alone they would generate to their end: 64 times 400 tokens, which take many times as long as a notice."""
    front_end.send(Hello())
    before = front_end.expect(Heartbeat).generated_tokens
    gone = FrontEnd(served[0])
    orphans = [f"orphan {i}" for i in range(64)]
    for name in orphans:
        gone.send(Submit(request_id=name, prompt=(1, 2, 3), sampling=ENDLESS))
    next(gone.events(orphans[-1]))
    gone.close()

    while (beat := front_end.expect(Heartbeat)).generated_tokens == before or beat.running or beat.waiting:
        pass

    assert beat.generated_tokens - before < len(orphans) * ENDLESS.max_tokens


@pytest.mark.parametrize("by", ["message", "SIGTERM"])
def test_a_drained_engine_finishes_what_runs_and_ends(world, by):
    with running_engine(world) as (endpoint, process):
        front_end = FrontEnd(endpoint)
        front_end.send(Submit(request_id="running", prompt=(1, 2, 3), sampling=ENDLESS))
        events = front_end.events("running")
        first = next(events)

        if by == "message":
            front_end.send(Drain())
        else:
            process.send_signal(signal.SIGTERM)

        assert len(first.token_ids) + sum(len(event.token_ids) for event in events) == ENDLESS.max_tokens
        assert process.wait(PATIENCE_S) == 0
        front_end.close()


def test_a_draining_engine_refuses_new_requests(world):
    with running_engine(world) as (endpoint, _):
        front_end = FrontEnd(endpoint)
        front_end.send(Submit(request_id="running", prompt=(1, 2, 3), sampling=ENDLESS))
        next(front_end.events("running"))

        front_end.send(Drain())
        front_end.send(Submit(request_id="late", prompt=(1, 2, 3), sampling=BRIEF))

        refused = front_end.expect(Rejected)
        assert (refused.request_id, refused.code) == ("late", "FL-OVERLOAD")
        front_end.close()


def test_an_engine_dies_with_its_parent(world):
    with tempfile.TemporaryDirectory(prefix="flora-") as folder:
        endpoint = f"ipc://{folder}/engine"
        arguments = engine_arguments(world, Path(folder), endpoint)
        program = PARENT.format(then="engine.wait()")
        parent = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True)
        assert parent.stdout is not None
        engine = os.pidfd_open(int(parent.stdout.readline()))
        front_end = FrontEnd(endpoint)
        front_end.send(Submit(request_id="running", prompt=(1, 2, 3), sampling=ENDLESS))
        next(front_end.events("running"))

        parent.kill()
        parent.wait()

        ended, _, _ = select.select([engine], [], [], PATIENCE_S)
        assert ended == [engine]
        os.close(engine)
        parent.stdout.close()
        front_end.close()


def test_an_engine_whose_parent_dies_before_it_can_look_ends_all_the_same(world):
    """It is another's child by then, and would stay that for good."""
    with tempfile.TemporaryDirectory(prefix="flora-") as folder:
        arguments = engine_arguments(world, Path(folder), f"ipc://{folder}/engine")
        program = PARENT.format(then="os._exit(0)")  # the engine is still starting Python
        parent = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True)
        assert parent.stdout is not None
        engine = int(parent.stdout.readline())
        assert parent.wait(PATIENCE_S) == 0

        ended, _, _ = select.select([parent.stdout], [], [], PATIENCE_S)  # which it has inherited: there is no more
        if not ended:
            os.kill(engine, signal.SIGKILL)
        parent.stdout.close()
        assert ended


def test_an_engine_that_nobody_can_talk_to_any_more_ends_and_says_why(world):
    with tempfile.TemporaryDirectory(prefix="flora-") as folder:
        endpoint = f"ipc://{folder}/engine"
        arguments = [*engine_arguments(world, Path(folder), endpoint)[2:], "--parent", str(os.getpid())]
        process = subprocess.Popen([sys.executable, "-c", DEAF, *arguments], stderr=subprocess.PIPE, text=True)
        front_end = FrontEnd(endpoint)
        front_end.send(Hello())

        _, log = process.communicate(timeout=PATIENCE_S)

        assert process.returncode == 1
        assert "mailroom lost" in log
        assert "nobody foresaw this" in log
        front_end.close()


def test_a_base_that_cannot_be_read_ends_the_process_with_a_clear_error(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    arguments = engine_arguments(World(empty, tmp_path), tmp_path, f"ipc://{tmp_path}/engine")
    arguments += ["--parent", str(os.getpid())]

    ended = subprocess.run([sys.executable, *arguments], stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S)

    assert ended.returncode == 1
    assert "error[FL-CHECKPOINT]" in ended.stderr
    assert "holds no safetensors weights" in ended.stderr


def test_the_collector_leaves_alone_what_lives_as_long_as_the_engine():
    """A walk over all that thousands of requests hold would be a pause of many steps."""
    held = [[i] for i in range(10_000)]
    before = gc.get_threshold()
    try:
        keep_collections_short()

        assert gc.get_freeze_count() > len(held)
        assert gc.isenabled()
        assert all(new > old for new, old in zip(gc.get_threshold(), before, strict=True))
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)
