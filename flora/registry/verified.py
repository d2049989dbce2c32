"""Blobs whose bytes were read and hashed: not again while their files stay as they were.

A blob's name is its sha256. Where its BLAKE3 is known as well, from the index, that is computed instead: as hard to
forge, four times as fast. One that does not fit proves nothing yet, for it may be wrong itself: the sha256 decides.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from flora.names import Digest
from flora.registry.disk import damaged
from flora.registry.mapped import Mapped, opened
from flora.registry.parts import Span

_PIECE_BYTES = 1 << 22
_MAX_VERIFIED = 10_000  # checked blobs that are remembered


class Verified:
    """Remembers each checked blob's inode, size and mtime of every file that it lies in."""

    def __init__(self) -> None:
        self._states: dict[str, object] = {}  # by hex digest

    def check(self, digest: Digest, spans: tuple[Span, ...]) -> tuple[Span, ...]:
        """The spans, whose bytes, one after the other, have that digest. Raises StoreError if not, and OSError."""
        with opened(spans) as (files, state):
            if self._states.get(digest.hex) != state:
                sha256 = hashlib.sha256()
                for piece in _read(files, spans):
                    sha256.update(piece)
                self._remember(digest, sha256.hexdigest(), state)
        return spans

    def check_either(self, digest: Digest, mapped: Mapped, known: str | None) -> str | None:
        """Checks the very bytes that are mapped: by `known`, the blob's BLAKE3, if that fits, else by its sha256.

        Returns what its BLAKE3 is, to be noted, if it is not `known`. Raises StoreError.
        """
        from blake3 import blake3

        if self._states.get(digest.hex) == mapped.state:
            return None
        if known and _blake3(mapped) == known:
            self._remember(digest, digest.hex, mapped.state)
            return None
        sha256, other = hashlib.sha256(), blake3()
        for piece in _cut(mapped):
            sha256.update(piece)
            other.update(piece)
        self._remember(digest, sha256.hexdigest(), mapped.state)
        return other.hexdigest()

    def _remember(self, digest: Digest, found: str, state: object) -> None:
        """Raises StoreError if `found` is another digest than the blob's."""
        if found != digest.hex:
            raise damaged(digest)
        if len(self._states) >= _MAX_VERIFIED:
            self._states.pop(next(iter(self._states)))
        self._states[digest.hex] = state


def _read(files: Mapping[Path, BinaryIO], spans: tuple[Span, ...]) -> Iterator[bytes]:
    for span in spans:
        files[span.path].seek(span.start)
        left = span.size
        while left and (piece := files[span.path].read(min(_PIECE_BYTES, left))):
            yield piece
            left -= len(piece)


def _blake3(mapped: Mapped) -> str:
    from blake3 import blake3

    hasher = blake3()
    for piece in mapped.pieces:
        hasher.update(piece)  # without Python's lock
    return hasher.hexdigest()


def _cut(mapped: Mapped) -> Iterator[memoryview]:
    for piece in mapped.pieces:
        for start in range(0, len(piece), _PIECE_BYTES):
            yield piece[start : start + _PIECE_BYTES]
