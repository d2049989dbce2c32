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
        message: ToLoader = decoder.decode(connection.recv_bytes())
        return message

    def answer(message: FromLoader) -> None:
        connection.send_bytes(encoder.encode(message))

    asked: ToLoader | None = None
    while True:
        try:
            asked = asked or hear()
            assert isinstance(asked, Read)
            target, asked = asked.target, None
            try:
                started_s = time.perf_counter()
                found = source.find(target)
                read_s = time.perf_counter() - started_s
                answer(Found(found.layout.table(), found.num_cells))
                room = hear()
                if isinstance(room, Read):  # there is none for it: it was given up
                    asked = room
                    continue
                started_s = time.perf_counter()
                geometry = source.geometry
                cells = cells_of(memory, room.start, found.num_cells, geometry.cell_elements, source.dtype)
                map_pages(arena, room.start, cells.nbytes)
                source.pack(found, cells)
                answer(Packed(read_s + time.perf_counter() - started_s))
            except (EOFError, OSError):
                raise
            except Exception as error:
                refusal = load_failed(target, error).error
                answer(Failed(refusal.code, refusal.what, refusal.cause, refusal.fix))
        except (EOFError, OSError):
            return


if __name__ == "__main__":
    main()
