"""A blob's bytes where they lie: its files, opened once and mapped, for whoever reads them and whoever checks them."""

import contextlib
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from flora.registry.parts import Span


@dataclass(frozen=True, slots=True)
class Mapped:
    """The bytes of a blob, one piece after the other; a file that is too short makes a piece that is."""

    pieces: tuple[memoryview, ...]  # one for each span; backed by the files' maps: not to be written to
    state: object  # of the files: equal as long as none was changed or replaced


def map_spans(spans: tuple[Span, ...]) -> Mapped:
    """The spans' bytes. They stay readable, as they are now, when the files are deleted or replaced. Raises OSError."""
    with opened(spans) as (files, state):
        maps = {path: _map(file) for path, file in files.items()}
    return Mapped(tuple(maps[span.path][span.start : span.start + span.size] for span in spans), state)


@contextlib.contextmanager
def opened(spans: tuple[Span, ...]) -> Iterator[tuple[Mapping[Path, BinaryIO], object]]:
    """The files that the spans lie in, and their state as Mapped has it. Raises OSError."""
    with contextlib.ExitStack() as stack:
        files = {path: stack.enter_context(path.open("rb")) for path in dict.fromkeys(span.path for span in spans)}
        stats = [(path, os.fstat(file.fileno())) for path, file in files.items()]
        yield files, (spans, [(path, stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats])


def _map(file: BinaryIO) -> memoryview:
    """Pages come in as they are touched, 64 KiB at a time: 2 ms for 100 MB in memory, where reading them takes 17."""
    try:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))  # torch wants it writable
    except ValueError:  # an empty file
        return memoryview(b"")
