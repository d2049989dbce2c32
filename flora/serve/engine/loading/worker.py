"""A loader process: reads adapters from the registry, checks them, and packs them into the shared arena.

It lives as long as its socket: when the engine's process ends, however it ends, the next read finds the end of file.
"""

import sys
import time
from multiprocessing.connection import Connection

import msgspec
import torch

from flora.serve.config import decode_engine_config
from flora.serve.engine.build import adapter_source
from flora.serve.engine.loading.arena import bytes_of, cells_of, map_arena, map_pages
from flora.serve.engine.loading.loader import load_failed
from flora.serve.engine.loading.messages import Failed, Found, FromLoader, Packed, Read, ToLoader
from flora.serve.request import AdapterTarget


class _EngineGone(Exception):
    """Nobody is there to hear or to be heard."""


def main() -> None:
    """Arguments: SOCKET_FD ARENA_FD ARENA_BYTES, all inherited; the first frame is the EngineConfig."""
    socket_fd, arena_fd, arena_bytes = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    connection = Connection(socket_fd)
    source = adapter_source(decode_engine_config(connection.recv_bytes()))
    arena = map_arena(arena_fd, arena_bytes)
    memory = bytes_of(arena)
    decoder, encoder = msgspec.msgpack.Decoder(ToLoader), msgspec.msgpack.Encoder()

    def hear() -> ToLoader:
        try:
            message: ToLoader = decoder.decode(connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise _EngineGone from error
        return message

    def answer(message: FromLoader) -> None:
        try:
            connection.send_bytes(encoder.encode(message))
        except OSError as error:
            raise _EngineGone from error

    def load(target: AdapterTarget) -> ToLoader | None:
        """What was asked for instead of giving it room, if it was given up."""
        started_s = time.perf_counter()
        found = source.find(target)
        read_s = time.perf_counter() - started_s
        answer(Found(found.num_cells))
        room = hear()
        if isinstance(room, Read):
            return room
        started_s = time.perf_counter()
        geometry = source.geometry
        cells = cells_of(memory, room.start, found.num_cells, geometry.adapter_cell_elements, source.dtype)
        map_pages(arena, room.start, cells.nbytes)
        table = source.pack(found, cells)
        answer(Packed(table, read_s + time.perf_counter() - started_s))
        return None

    asked: ToLoader | None = None
    while True:
        try:
            asked = asked or hear()
            assert isinstance(asked, Read)
            target, asked = asked.target, None
            try:
                asked = load(target)
            except _EngineGone:
                raise
            except Exception as error:  # of this adapter alone, a disk that cannot be read among them
                refusal = load_failed(target, error).error
                answer(Failed(refusal.code, refusal.what, refusal.cause, refusal.fix))
        except _EngineGone:
            return


if __name__ == "__main__":
    main()
