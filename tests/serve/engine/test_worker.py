"""A loader process answers for each adapter by itself, and ends with its engine alone."""

import socket
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread

import msgspec
import pytest

from flora.serve.config import EngineConfig, encode_engine_config
from flora.serve.engine.loading import worker
from flora.serve.engine.loading.arena import Arena
from flora.serve.engine.loading.messages import Failed, FromLoader, Read
from flora.serve.request import AdapterTarget


class Disk:
    """Where every adapter should be."""

    def find(self, target: AdapterTarget) -> None:
        raise OSError(5, f"no sector of {target.label} answers")


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """The engine's end of a worker that runs in a thread, over such a disk; the thread."""
    monkeypatch.setattr(worker, "adapter_source", lambda config: Disk())
    monkeypatch.setattr(worker.torch, "set_num_threads", lambda count: None)  # this process is not the worker's alone
    ours, theirs = socket.socketpair()
    arena = Arena(4096, pinned=False)
    monkeypatch.setattr(sys, "argv", ["worker", str(theirs.detach()), str(arena.fd), str(arena.num_bytes)])
    connection = Connection(ours.detach())
    thread = Thread(target=worker.main)
    thread.start()
    config = EngineConfig(base=Path("base"), registry="registry", cache_dir=tmp_path)
    connection.send_bytes(encode_engine_config(config))
    yield connection, thread
    connection.close()
    thread.join(timeout=60)
    arena.close()


def test_a_disk_that_cannot_be_read_fails_its_adapter_alone_and_the_end_of_the_engine_is_the_workers(engine):
    connection, thread = engine

    for label in ("first", "second"):
        target = AdapterTarget(serving_digest=label, version_digest=label, label=label)
        connection.send_bytes(msgspec.msgpack.encode(Read(target)))
        said = msgspec.msgpack.decode(connection.recv_bytes(), type=FromLoader)
        assert isinstance(said, Failed)
        assert f"adapter {label} could not be loaded" in said.what
        assert f"no sector of {label} answers" in (said.cause or "")

    assert thread.is_alive()
    connection.close()
    thread.join(timeout=60)
    assert not thread.is_alive()
