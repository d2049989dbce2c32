"""Blobs whose bytes were read and hashed: not again while their files stay as they were.

A blob's name is its sha256. Where its BLAKE3 is known as well, from the index, that is computed instead: as hard to
forge, four times as fast. One that does not fit proves nothing yet, for it may be wrong itself: the sha256 decides.
"""

import contextlib
import hashlib
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from flora.names import Digest
from flora.registry.disk import damaged
from flora.registry.parts import Span

_READ_BYTES = 1 << 22
_MAX_VERIFIED = 10_000  # checked blobs that are remembered


class Verified:
    """Remembers each checked blob's inode, size and mtime of every file that it lies in."""

    def __init__(self) -> None:
        self._states: dict[str, object] = {}  # by hex digest

    def check(self, digest: Digest, spans: tuple[Span, ...]) -> tuple[Span, ...]:
        """The spans, whose bytes, one after the other, have that digest. Raises StoreError if not, and OSError."""
        with _opened(spans) as (files, state):
            if self._states.get(digest.hex) != state:
                sha256 = hashlib.sha256()
                for piece in _pieces(files, spans):
                    sha256.update(piece)
                self._remember(digest, sha256.hexdigest(), state)
        return spans

    def check_either(self, digest: Digest, spans: tuple[Span, ...], known: str | None) -> str | None:
        """As check, by `known`, the blob's BLAKE3, if that fits; otherwise what its BLAKE3 is, to be noted."""
        with _opened(spans) as (files, state):
            if self._states.get(digest.hex) == state:
                return None
            if known and _blake3(files, spans) == known:
                self._remember(digest, digest.hex, state)
                return None
            sha256, other = hashlib.sha256(), blake3()
            for piece in _pieces(files, spans):  # both of the same bytes
                sha256.update(piece)
                other.update(piece)
            self._remember(digest, sha256.hexdigest(), state)
        return other.hexdigest()

    def _remember(self, digest: Digest, found: str, state: object) -> None:
        """Raises StoreError if `found` is another digest than the blob's."""
        if found != digest.hex:
            raise damaged(digest)
        if len(self._states) >= _MAX_VERIFIED:
            self._states.pop(next(iter(self._states)))
        self._states[digest.hex] = state


@contextlib.contextmanager
def _opened(spans: tuple[Span, ...]) -> Iterator[tuple[Mapping[Path, BinaryIO], object]]:
    """The files that the spans lie in, and what tells that they are the same as at another time."""
    with contextlib.ExitStack() as opened:
        files = {path: opened.enter_context(path.open("rb")) for path in dict.fromkeys(span.path for span in spans)}
        stats = [(path, os.fstat(file.fileno())) for path, file in files.items()]
        yield files, (spans, [(path, stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats])


def _pieces(files: Mapping[Path, BinaryIO], spans: tuple[Span, ...]) -> Iterator[bytes]:
    for span in spans:
        files[span.path].seek(span.start)
        left = span.size
        while left and (piece := files[span.path].read(min(_READ_BYTES, left))):
            yield piece
            left -= len(piece)


def _blake3(files: Mapping[Path, BinaryIO], spans: tuple[Span, ...]) -> str | None:
    """Of the files' maps: to copy out of the page cache takes almost as long as to hash. None if one is too short."""
    hasher = blake3()
    maps: dict[Path, memoryview] = {}
    for span in spans:
        if not span.size:
            continue
        if span.path not in maps:
            if not os.fstat(files[span.path].fileno()).st_size:
                return None
            maps[span.path] = memoryview(mmap.mmap(files[span.path].fileno(), 0, prot=mmap.PROT_READ))
        data = maps[span.path][span.start : span.start + span.size]
        if len(data) != span.size:
            return None
        hasher.update(data)  # without Python's lock
    return hasher.hexdigest()
