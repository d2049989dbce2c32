"""A loader process as the engine's own sees it: it finds an adapter, then packs it where it is told."""

import os
import socket
import subprocess
import sys
from multiprocessing.connection import Connection

import msgspec

from flora import errors
from flora.child_process import end_child, how_it_ended
from flora.errors import FloraError, ServeError
from flora.serve.engine.loading.arena import Arena
from flora.serve.engine.loading.messages import Failed, Found, FromLoader, Pack, Packed, Read, ToLoader
from flora.serve.request import AdapterTarget

_LAST_MOMENT_S = 2.0  # between the end of a process's socket and its own
_ERRORS = {kind.code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FloraError)}


class Child:
    """One process of loading/worker.py. One thread asks it and buries it; `end` is any thread's."""

    def __init__(self, config: bytes, arena: Arena) -> None:
        """config  an encoded EngineConfig"""
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "flora.serve.engine.loading.worker"]
        command += [str(theirs.fileno()), str(arena.fd), str(arena.num_bytes)]
        self._process = subprocess.Popen(command, pass_fds=(theirs.fileno(), arena.fd), env=_environment())
        theirs.close()
        self._connection = Connection(ours.detach())
        self._connection.send_bytes(config)
        self._has_hung_up = False
        self.has_answered = False  # anything, a refusal too: it can start, and read what it is told
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromLoader)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return not self._has_hung_up and self._process.poll() is None  # its socket is closed a moment before its end

    def find(self, target: AdapterTarget) -> Found:
        """What the adapter needs. Raises what RegistrySource.find raises, or ServeError."""
        found = self._ask(Read(target))
        assert isinstance(found, Found)
        return found

    def pack(self, start: int) -> Packed:
        """Packs what was found at that byte of the arena.

        Raises what RegistrySource.pack raises, or ServeError; the process does not write there any more.
        """
        packed = self._ask(Pack(start))
        assert isinstance(packed, Packed)
        return packed

    def end(self) -> None:
        """Ends the process, and whatever is asked of it. The socket stays: another thread may be reading from it."""
        self._process.terminate()
        self._process.wait()

    def bury(self) -> str:
        """Of a process that is not alive any more: how it ended. Nothing of it is left."""
        self._connection.close()
        return how_it_ended(self._wait())

    def close(self) -> None:
        """Once nobody asks any more."""
        self._connection.close()

    def _ask(self, message: ToLoader) -> Found | Packed:
        try:
            self._connection.send_bytes(self._encoder.encode(message))
            said: FromLoader = self._decoder.decode(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            self._has_hung_up = True
            raise ServeError(
                f"the loader process ended while it loaded this adapter: {how_it_ended(self._wait())}",
                fix="ask again: another process takes its place. If that ends too, see the server's log; if the system "
                "killed it for want of memory, start the server with a smaller --host-cache, or fewer --loaders",
            ) from error
        self.has_answered = True
        if isinstance(said, Failed):
            raise _ERRORS.get(said.code, ServeError)(said.what, cause=said.cause, fix=said.fix)
        return said

    def _wait(self) -> int:
        """The exit code of a process that has hung up: it ends by itself in a moment, or is made to."""
        try:
            return self._process.wait(_LAST_MOMENT_S)
        except subprocess.TimeoutExpired:
            return end_child(self._process, _LAST_MOMENT_S)


def _environment() -> dict[str, str]:
    """Ours, with a word to glibc: copies of 64 KiB or more go past the caches, for no loader reads what it has packed.

    Left to itself glibc does so from a share of the last cache on, which no factor reaches. What is set already wins.
    """
    past_caches = "glibc.cpu.x86_non_temporal_threshold=0x10000"
    given = os.environ.get("GLIBC_TUNABLES")
    return os.environ | {"GLIBC_TUNABLES": f"{past_caches}:{given}" if given else past_caches}
