"""Blobs whose bytes were read and hashed: not again while their files stay as they were."""

import contextlib
import hashlib
import os

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
        with contextlib.ExitStack() as opened:
            files = {path: opened.enter_context(path.open("rb")) for path in dict.fromkeys(span.path for span in spans)}
            stats = [(path, os.fstat(file.fileno())) for path, file in files.items()]
            state = spans, [(path, stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
            if self._states.get(digest.hex) == state:
                return spans
            sha256 = hashlib.sha256()
            for span in spans:
                files[span.path].seek(span.start)
                left = span.size
                while left and (piece := files[span.path].read(min(_READ_BYTES, left))):
                    sha256.update(piece)
                    left -= len(piece)
        if sha256.hexdigest() != digest.hex:
            raise damaged(digest)
        if len(self._states) >= _MAX_VERIFIED:
            self._states.pop(next(iter(self._states)))
        self._states[digest.hex] = state
        return spans
