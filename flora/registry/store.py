"""The blob store: bytes by their sha256, written once, checked whenever they are read.

    blobs/sha256/<2 hex>/<64 hex>    a blob, read-only
    tmp/<random>                     a write in progress, or what a crash left of one

This is the only file that makes a path from a digest.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from flora.errors import StoreError
from flora.names import Digest

_READ_BYTES = 1 << 22
_MAX_VERIFIED = 10_000  # checked files that a store remembers
_CAUSES = {
    errno.ENOSPC: ("the disk is full", "free some space (`flora gc` takes what nothing refers to) and run this again"),
    errno.EDQUOT: ("the disk quota is used up", "free some space (`flora gc` helps) and run this again"),
    errno.EFBIG: ("the file is larger than this system lets it be", "raise the limit (ulimit -f) and run this again"),
    errno.EROFS: ("the file system is read-only", "name a registry that can be written, with --registry"),
    errno.EACCES: ("this user may not write there", "name a registry of your own with --registry, or ask for access"),
    errno.EIO: (
        "the disk reports an input/output error",
        "check the disk, then `flora fsck`, and run this again",
    ),
}


@dataclass(frozen=True, slots=True)
class Blob:
    """A stored blob, as manifests name it."""

    digest: str
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class BlobFile:
    """A blob as it lies in the store."""

    digest: Digest
    size: int
    modified_at: float  # seconds since the epoch


@dataclass(frozen=True, slots=True)
class Leftover:
    """A file under tmp/ whose writer is gone."""

    name: str
    size: int  # bytes


class BlobStore:
    """Blobs under one folder. Writing the same bytes twice is the same as once."""

    def __init__(self, root: Path) -> None:
        self._verified: dict[str, tuple[int, int, int]] = {}  # by hex digest: inode, size and mtime when it was checked
        self._blobs = root / "blobs" / "sha256"
        self._tmp = root / "tmp"

    def put(self, pieces: Iterable[bytes | memoryview]) -> Blob:
        """Stores the concatenated pieces durably: temp file, fsync, rename, fsync of the folder. Raises StoreError.

        An older blob of the same digest is replaced, which heals it if it was damaged and renews its grace time.
        """
        temporary = self._tmp / uuid.uuid4().hex
        try:
            self._make_folder(self._tmp)
            with _create_locked(temporary) as file:
                sha256, size = hashlib.sha256(), 0
                for piece in pieces:
                    sha256.update(piece)
                    size += file.write(piece)
                file.flush()
                os.fsync(file.fileno())
                digest = Digest(f"sha256:{sha256.hexdigest()}")
                path = self._path(digest)
                self._make_folder(path.parent)
                os.replace(temporary, path)
            sync_folder(path.parent)
            return Blob(str(digest), size)
        except OSError as error:
            raise store_error(f"a blob cannot be written to {self._blobs}", error) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def read(self, digest: Digest) -> bytes:
        """The blob's bytes, checked against `digest`. Raises StoreError if it is missing or damaged."""
        try:
            data = self._path(digest).read_bytes()
        except OSError as error:
            raise _unreadable(digest, error) from error
        if hashlib.sha256(data).hexdigest() != digest.hex:
            raise _damaged(digest)
        return data

    def verified_path(self, digest: Digest) -> Path:
        """The blob's file, after reading all of it and checking it against `digest`: for readers that map files.

        A file that this store has checked is not read again while its inode, size and mtime stay as they were.
        """
        path = self._path(digest)
        try:
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
                state = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
                if self._verified.get(digest.hex) == state:
                    return path
                sha256 = hashlib.sha256()
                while piece := file.read(_READ_BYTES):
                    sha256.update(piece)
        except OSError as error:
            raise _unreadable(digest, error) from error
        if sha256.hexdigest() != digest.hex:
            raise _damaged(digest)
        if len(self._verified) >= _MAX_VERIFIED:
            self._verified.pop(next(iter(self._verified)))
        self._verified[digest.hex] = state
        return path

    @contextlib.contextmanager
    def verified_beside(self, digest: Digest) -> Iterator[Path]:
        """The blob's file, checked by another thread while the caller reads it: reading and hashing take equally long.

        What the caller made of the file counts once this has ended. Raises StoreError then if the file is missing or
        damaged, in place of whatever that made the caller raise.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="blob-check") as beside:
            check = beside.submit(self.verified_path, digest)
            try:
                yield self._path(digest)
            finally:
                check.result()

    def size(self, digest: Digest) -> int | None:
        """The stored size in bytes, or None if there is no such blob."""
        try:
            return self._path(digest).stat().st_size
        except FileNotFoundError:
            return None

    def delete(self, digest: Digest) -> None:
        self._path(digest).unlink(missing_ok=True)

    def files(self) -> Iterator[BlobFile]:
        """Every blob in the store. Files whose names are no digests are left alone and not listed."""
        for path in sorted(self._blobs.glob("??/*")):
            try:
                stat = path.stat()
            except FileNotFoundError:  # taken by a gc at this moment
                continue
            with contextlib.suppress(Exception):
                yield BlobFile(Digest(f"sha256:{path.name}"), stat.st_size, stat.st_mtime)

    def leftovers(self, *, older_than_s: float = 0.0, take: bool = False) -> list[Leftover]:
        """Files under tmp/ that no living writer holds and that are as old; with `take` they are deleted."""
        limit = time.time() - older_than_s
        found = []
        for path in sorted(self._tmp.glob("*")):
            with contextlib.suppress(OSError), path.open("rb") as file:  # OSError: held, or renamed at this moment
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                stat = os.fstat(file.fileno())
                if stat.st_mtime <= limit:
                    if take:
                        path.unlink()
                    found.append(Leftover(path.name, stat.st_size))
        return found

    def _path(self, digest: Digest) -> Path:
        return self._blobs / digest.hex[:2] / digest.hex

    def _make_folder(self, folder: Path) -> None:
        """Makes `folder`, and syncs each folder above that gained an entry."""
        if folder.is_dir():
            return
        self._make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def store_error(what: str, error: OSError) -> StoreError:
    """The StoreError of a failed write, with its cause and fix by errno."""
    cause, fix = _CAUSES.get(error.errno or 0, (str(error), "mend the cause and run this again: it is safe to repeat"))
    return StoreError(what, cause=cause, fix=fix, errno=error.errno)


def sync_folder(folder: Path) -> None:
    """Makes durable which entries the folder has."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _create_locked(path: Path) -> BinaryIO:
    """A new file, held by a lock that ends with its writer: what `leftovers` finds unlocked, a crash has left."""
    while True:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)  # a blob never changes after this
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return os.fdopen(descriptor, "wb")
        os.close(descriptor)  # a gc came between creating and locking, and took it


def _unreadable(digest: Digest, error: OSError) -> StoreError:
    if isinstance(error, FileNotFoundError):
        return StoreError(
            f"blob {digest} is missing from the store",
            cause="a file was deleted by hand, or a copy of the registry is incomplete",
            fix="`flora fsck` lists what is affected; extract or import that adapter again",
            digest=str(digest),
        )
    return store_error(f"blob {digest} cannot be read", error)


def _damaged(digest: Digest) -> StoreError:
    return StoreError(
        f"blob {digest} is damaged: its bytes have another sha256",
        cause="the disk or a copy changed it after it was written",
        fix="`flora fsck` lists what is affected; extract or import that adapter again, which replaces the blob",
        digest=str(digest),
    )
