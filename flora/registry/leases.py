"""Leases: versions that a running process uses, so that no gc takes their blobs even when they were removed.

A lease is a file that its process holds locked, with a version's digest on each line. The lock ends with the process,
however it ends; a file that nobody holds is kept for the grace time and then taken, for another machine's lock may not
be seen on a network file system: what a process there uses, it writes again every so often.
"""

import contextlib
import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from flora.errors import NameInvalid, StoreError
from flora.names import Digest
from flora.registry.manifest import parse_manifest
from flora.registry.store import BlobStore, store_error

FOLDER = "leases"


class Lease:
    """What one process uses. Safe for one thread at a time; ends with `close`, or with the process."""

    def __init__(self, root: Path) -> None:
        """Raises StoreError if the registry's folder cannot be written."""
        self._kept: set[str] = set()
        try:
            (root / FOLDER).mkdir(exist_ok=True)
            self._path = root / FOLDER / uuid.uuid4().hex
            self._file = self._path.open("ab", buffering=0)
            fcntl.flock(self._file, fcntl.LOCK_EX)
        except OSError as error:
            raise store_error(f"a lease cannot be written to {root}", error) from error

    def keep(self, version_digest: str) -> None:
        """From now on that version's blobs stay."""
        if version_digest in self._kept:
            os.utime(self._path)
            return
        self._file.write(f"{Digest(version_digest)}\n".encode())
        self._kept.add(version_digest)

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
        self._file.close()


def leased_blobs(root: Path, store: BlobStore, *, grace_s: float, take: bool) -> set[str]:
    """Digests of every blob that a live lease needs; with `take`, leases that ended long ago are deleted."""
    needed: set[str] = set()
    for text in _live(root, grace_s, take):
        with contextlib.suppress(NameInvalid, StoreError):  # a manifest that is gone keeps nothing
            digest = Digest(text)
            needed.add(str(digest))
            manifest = parse_manifest(store.read(digest), digest)
            needed |= {blob.digest for blob in manifest.blobs} | {manifest.header.base.base_id or str(digest)}
    return needed


def _live(root: Path, grace_s: float, take: bool) -> Iterator[str]:
    limit = time.time() - grace_s
    for path in sorted((root / FOLDER).glob("*")):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                is_held = True
            else:
                is_held = False
            if is_held or os.fstat(file.fileno()).st_mtime > limit:
                yield from file.read().decode("ascii", "replace").split()
            elif take:
                path.unlink()
