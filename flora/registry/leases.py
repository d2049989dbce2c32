"""Leases: versions that a running process uses, so that no gc takes their blobs even when they were removed.

A lease is a file that its process holds locked, with a version on each line: digest, name, number and when it was made.
The lock ends with the process, however it ends; a file that nobody holds is kept for the grace time and then taken, for
another machine's lock may not be seen on a network file system: what a process there uses, it writes again at times.

A server reads by several processes, each with a lease of its own. What one of them has a lease of, the others find here
once it is removed: a stream that came in before the removal is answered by whichever of them is free.
"""

import contextlib
import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from flora.errors import NameInvalid, StoreError
from flora.names import Digest
from flora.registry.disk import store_error
from flora.registry.manifest import parse_manifest
from flora.registry.packing import describe_version, get_report
from flora.registry.records import Version
from flora.registry.store import BlobStore
from flora.registry.unfinished import create_locked

FOLDER = "leases"


class Lease:
    """What one process uses. Safe for one thread at a time; ends with `close`, or with the process."""

    def __init__(self, root: Path) -> None:
        """Raises StoreError if the registry's folder cannot be written."""
        self._kept: set[str] = set()
        try:
            (root / FOLDER).mkdir(exist_ok=True)
            self._path = root / FOLDER / uuid.uuid4().hex
            self._file = create_locked(self._path)
        except OSError as error:
            raise store_error(f"a lease cannot be written to {root}", error) from error

    def keep(self, version: Version) -> None:
        """From now on that version's blobs stay."""
        if version.digest in self._kept:
            os.utime(self._path)
            return
        line = f"{Digest(version.digest)} {version.name} {version.number} {version.created_at.isoformat()}\n"
        self._file.write(line.encode())
        self._file.flush()
        self._kept.add(version.digest)

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
        self._file.close()


def leased_version(root: Path, store: BlobStore, version_digest: str) -> Version | None:
    """The version of that digest as it was before its removal, if a process of this machine holds a lease of it.

    Raises StoreError if its manifest or report is damaged.
    """
    for line in _live(root, grace_s=None, take=False):
        if line[0] == version_digest and len(line) == 4:
            digest, name, number, created_at = line
            manifest = parse_manifest(store.read(Digest(digest)), Digest(digest))
            return describe_version(
                manifest,
                get_report(store, manifest),
                name=name,
                number=int(number),
                digest=digest,
                created_at=datetime.fromisoformat(created_at),
            )
    return None


def leased_blobs(root: Path, store: BlobStore, *, grace_s: float, take: bool) -> set[str]:
    """Digests of every blob that a live lease needs; with `take`, leases that ended long ago are deleted."""
    needed: set[str] = set()
    for text, *_ in _live(root, grace_s, take):
        with contextlib.suppress(NameInvalid, StoreError):  # a manifest that is gone keeps nothing
            digest = Digest(text)
            needed.add(str(digest))
            manifest = parse_manifest(store.read(digest), digest)
            needed |= {blob.digest for blob in manifest.blobs} | {manifest.header.base.base_id or str(digest)}
    return needed


def _live(root: Path, grace_s: float | None, take: bool) -> Iterator[list[str]]:
    """The words of each line of the leases that are held, or with `grace_s` were written within it."""
    for path in sorted((root / FOLDER).glob("*")):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                is_live = True
            else:
                is_live = grace_s is not None and os.fstat(file.fileno()).st_mtime > time.time() - grace_s
            if is_live:
                yield from filter(None, map(str.split, file.read().decode("ascii", "replace").splitlines()))
            elif take:
                path.unlink()
