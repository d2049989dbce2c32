"""The engine's socket: no frame ends it, and should it end all the same, somebody hears of it."""

import tempfile
from collections.abc import Iterator
from queue import Queue

import msgspec
import pytest
import zmq

from flora.serve.engine.mailroom import Mailroom
from flora.serve.messages import Cancel, FromEngine, Hello
from tests.serve.idle_engine import BEAT, READY

PATIENCE_S = 60


@pytest.fixture
def endpoint() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="flora-") as folder:  # short: an ipc path has at most 107 bytes
        yield f"ipc://{folder}/engine"


@pytest.fixture
def front_end() -> Iterator[zmq.Socket]:
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVTIMEO, PATIENCE_S * 1000)
    yield socket
    socket.close()


@pytest.mark.parametrize(
    "frame",
    [
        b"\xc1 no MessagePack",
        msgspec.msgpack.encode(Cancel(request_id="abcd")).replace(b"abcd", b"\xff\xfe\xfd\xfc"),
        b"\x82\xa4type\xa6Cancel\xa1x" + b"\x91" * 100_000,
        b"",
    ],
    ids=["no message", "a string that is not UTF-8", "arrays in arrays", "nothing"],
)
def test_a_frame_that_cannot_be_read_is_logged_and_the_next_one_answered(endpoint, front_end, caplog, frame):
    lost: Queue[None] = Queue()
    mailroom = Mailroom(endpoint, READY, BEAT, on_lost=lambda: lost.put(None))
    front_end.connect(endpoint)

    front_end.send(frame)
    front_end.send(msgspec.msgpack.encode(Hello()))
    front_end.send(msgspec.msgpack.encode(Cancel(request_id="r")))

    assert msgspec.msgpack.decode(front_end.recv(), type=FromEngine) == READY
    [(_, message)] = mailroom.receive(PATIENCE_S)
    assert message == Cancel(request_id="r")
    assert "message unread" in caplog.text
    mailroom.close()
    assert lost.empty()


def test_a_mailroom_that_ends_by_itself_says_so_and_why(endpoint, caplog):
    lost: Queue[None] = Queue()

    def tick() -> None:
        raise RuntimeError("nobody foresaw this")

    mailroom = Mailroom(endpoint, READY, BEAT, tick, on_lost=lambda: lost.put(None))

    lost.get(timeout=PATIENCE_S)
    assert "mailroom lost" in caplog.text
    assert "nobody foresaw this" in caplog.text
    mailroom._thread.join()
