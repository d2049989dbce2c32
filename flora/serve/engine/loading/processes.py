"""Loads in processes of their own: reading, hashing and packing take no time from the engine's interpreter."""

import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from queue import Empty, SimpleQueue
from threading import Thread

import msgspec
import torch

from flora import errors
from flora.errors import FloraError, ServeError
from flora.serve.config import EngineConfig, encode_engine_config
from flora.serve.engine.layout import PoolGeometry
from flora.serve.engine.loading.arena import Arena, cells_of
from flora.serve.engine.loading.loader import Finished, LoadFailed
from flora.serve.engine.loading.messages import Failed, Found, FromLoader, Pack, Packed, Read
from flora.serve.engine.loading.packing import PackedAdapter
from flora.serve.request import AdapterTarget

_ERRORS = {kind.code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FloraError)}


@dataclass(slots=True)
class _Worker:
    """One loader process and the load it is at."""

    connection: Connection
    process: subprocess.Popen[bytes]
    target: AdapterTarget | None = None
    found: Found | None = None
    start: int | None = None  # of the arena range it fills


class ProcessLoader:
    """`num_workers` loader processes over one arena. See Loader."""

    def __init__(
        self,
        config: EngineConfig,
        geometry: PoolGeometry,
        dtype: torch.dtype,
        arena: Arena,
        num_workers: int,
        on_finished: Callable[[], None],
    ) -> None:
        """on_finished  is called from a thread whenever a loader has said something: it wakes whoever waits"""
        self.max_loading = 2 * num_workers
        self._geometry = geometry
        self._dtype = dtype
        self._arena = arena
        self._on_finished = on_finished
        self._make_room: Callable[[int], bool] = lambda _: False
        self._asked: deque[AdapterTarget] = deque()
        self._starved: list[_Worker] = []  # they wait for room in the arena
        self._said: SimpleQueue[tuple[_Worker, FromLoader]] = SimpleQueue()
        self._encoder = msgspec.msgpack.Encoder()
        first = encode_engine_config(config)
        self._workers = [self._spawn(first) for _ in range(num_workers)]
        self._closing = False
        self._thread = Thread(target=self._listen, name="loader-mail", daemon=True)
        self._thread.start()

    def use_cache(self, make_room: Callable[[int], bool]) -> None:
        """See Loader.use_cache; here it frees ranges of the arena."""
        self._make_room = make_room

    def start(self, target: AdapterTarget) -> None:
        self._asked.append(target)
        self._dispatch()

    def finished(self, timeout_s: float = 0.0) -> list[Finished]:
        """See Loader.finished."""
        done: list[Finished] = []
        try:
            done += self._hear(*self._said.get(block=timeout_s > 0, timeout=timeout_s or None))
            while True:
                done += self._hear(*self._said.get_nowait())
        except Empty:
            pass
        for worker in list(self._starved):
            self._grant(worker)
        self._dispatch()
        return done

    def close(self) -> None:
        self._closing = True
        for worker in self._workers:
            worker.connection.close()
            worker.process.terminate()
            worker.process.wait()
        self._thread.join(timeout=5)
        self._arena.close()

    def _spawn(self, first: bytes) -> _Worker:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "flora.serve.engine.loading.worker"]
        command += [str(theirs.fileno()), str(self._arena.fd), str(self._arena.num_bytes)]
        process = subprocess.Popen(command, pass_fds=(theirs.fileno(), self._arena.fd), env=_environment())
        theirs.close()
        connection = Connection(ours.detach())
        connection.send_bytes(first)
        return _Worker(connection, process)

    def _listen(self) -> None:
        decoder = msgspec.msgpack.Decoder(FromLoader)
        by_connection = {worker.connection: worker for worker in self._workers}
        while by_connection and not self._closing:
            for connection in wait(list(by_connection), timeout=1.0):
                assert isinstance(connection, Connection)
                worker = by_connection[connection]
                try:
                    message: FromLoader = decoder.decode(connection.recv_bytes())
                except (EOFError, OSError):
                    del by_connection[connection]
                    message = Failed(ServeError.code, "a loader process ended", None, "see the server's log")
                self._said.put((worker, message))
                self._on_finished()

    def _dispatch(self) -> None:
        for worker in self._workers:
            if not self._asked:
                return
            if worker.target is None and worker.process.poll() is None:
                worker.target = self._asked.popleft()
                worker.connection.send_bytes(self._encoder.encode(Read(worker.target)))

    def _hear(self, worker: _Worker, message: FromLoader) -> list[Finished]:
        target = worker.target
        if target is None:
            return []
        if isinstance(message, Found):
            worker.found = message
            self._starved.append(worker)
            return []
        found, start = worker.found, worker.start
        worker.target = worker.found = worker.start = None
        if isinstance(message, Failed):
            if found and start is not None:
                self._arena.release(start, self._num_bytes(found))
            error = _ERRORS.get(message.code, ServeError)(message.what, cause=message.cause, fix=message.fix)
            return [LoadFailed(target.serving_digest, error)]
        assert isinstance(message, Packed)
        assert found
        assert start is not None
        num_bytes = self._num_bytes(found)
        return [
            PackedAdapter(
                target.serving_digest,
                found.table,
                cells_of(self._arena.memory, start, found.num_cells, self._geometry.cell_elements, self._dtype),
                self._geometry.pages_for_elements(found.table.num_elements),
                load_s=message.load_s,
                release=lambda: self._arena.release(start, num_bytes),
            )
        ]

    def _grant(self, worker: _Worker) -> None:
        """Gives the worker its range of the arena, or leaves it waiting."""
        assert worker.found is not None
        num_bytes = self._num_bytes(worker.found)
        start = self._arena.allocate(num_bytes)
        while start is None and self._make_room(num_bytes):
            start = self._arena.allocate(num_bytes)
        if start is not None:
            worker.start = start
            self._starved.remove(worker)
            worker.connection.send_bytes(self._encoder.encode(Pack(start)))

    def _num_bytes(self, found: Found) -> int:
        return found.num_cells * self._geometry.cell_elements * self._dtype.itemsize


def _environment() -> dict[str, str]:
    """Ours, with a word to glibc: copies of 64 KiB or more go past the caches, for no loader reads what it has packed.

    Left to itself glibc does so from a share of the last cache on, which no factor reaches. What is set already wins.
    """
    past_caches = "glibc.cpu.x86_non_temporal_threshold=0x10000"
    given = os.environ.get("GLIBC_TUNABLES")
    return os.environ | {"GLIBC_TUNABLES": f"{past_caches}:{given}" if given else past_caches}
