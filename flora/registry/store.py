"""The blob store: bytes by their sha256, written once, checked whenever they are read.

    blobs/sha256/<2 hex>/<64 hex>          a blob, read-only
    blobs/sha256/<2 hex>/<64 hex>.parts    in its place: the blobs that its bytes lie in; see parts.py
    tmp/<random>                           a write in progress, or what a crash left of one

A blob that is there in both forms is read as its own file.

This is the only file that makes a path from a digest.
"""

import contextlib
import errno
import hashlib
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from flora.errors import NameInvalid, StoreError
from flora.names import Digest
from flora.registry.disk import damaged, store_error, sync_folder, unreadable
from flora.registry.mapped import Mapped, map_spans
from flora.registry.parts import Part, Span, encode_parts, parse_parts
from flora.registry.unfinished import Leftover, create_locked, find_leftovers
from flora.registry.verified import Verified

_PARTS = ".parts"


@dataclass(frozen=True, slots=True)
class Blob:
    """A stored blob, as manifests name it."""

    digest: str
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class BlobFile:
    """A file of the store: a blob, or the list of its parts."""

    digest: Digest
    size: int  # bytes, of this file
    modified_at: float  # seconds since the epoch
    is_list: bool = False


class BlobStore:
    """Blobs under one folder. Writing the same bytes twice is the same as once."""

    def __init__(self, root: Path) -> None:
        self._verified = Verified()
        self._blobs = root / "blobs" / "sha256"
        self._tmp = root / "tmp"

    def put(self, pieces: Iterable[bytes | memoryview]) -> Blob:
        """Stores the concatenated pieces durably: temp file, fsync, rename, fsync of the folder. Raises StoreError.

        An older blob of the same digest is replaced, which heals it if it was damaged and renews its grace time.
        """
        return self._write(pieces, lambda digest: self._path(digest))

    def _write(self, pieces: Iterable[bytes | memoryview], place: Callable[[Digest], Path]) -> Blob:
        """Writes the file that `place` names by the digest of what was written."""
        temporary = self._tmp / uuid.uuid4().hex
        try:
            self._make_folder(self._tmp)
            with create_locked(temporary) as file:
                sha256, size = hashlib.sha256(), 0
                for piece in pieces:
                    sha256.update(piece)
                    size += file.write(piece)
                file.flush()
                os.fsync(file.fileno())
                digest = Digest(f"sha256:{sha256.hexdigest()}")
                path = place(digest)
                self._make_folder(path.parent)
                os.replace(temporary, path)
            sync_folder(path.parent)
            return Blob(str(digest), size)
        except OSError as error:
            raise store_error(f"a blob cannot be written to {self._blobs}", error) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def replace_by_parts(self, digest: Digest, parts: Sequence[Part]) -> bool:
        """Lets the parts stand for the blob, durably, in place of its file or of other parts; False if one is missing.

        For the holder of the index's write lock: no gc takes a part at this moment. Raises StoreError.
        """
        try:
            if not self._has_all(parts):
                return False
            self._write([encode_parts(parts)], lambda _: self._list_path(digest))
            self._path(digest).unlink(missing_ok=True)
        except OSError as error:
            raise store_error(f"blob {digest}, which lies in parts, cannot be deleted", error) from error
        return True

    def read(self, digest: Digest) -> bytes:
        """The blob's bytes, checked against `digest`. Raises StoreError if it is missing or damaged."""
        try:
            data = b"".join(_read(span) for span in self.spans(digest))
        except OSError as error:
            raise unreadable(digest, error) from error
        if hashlib.sha256(data).hexdigest() != digest.hex:
            raise damaged(digest)
        return data

    def spans(self, digest: Digest) -> tuple[Span, ...]:
        """Where the blob's bytes lie: its own file, or ranges of others. Raises StoreError if it is missing.

        Another process may cut a file into parts at any moment: a reader that finds it gone asks again.
        """
        path = self._path(digest)
        for _ in range(2):  # whatever form it changes to is there before the other one goes
            with contextlib.suppress(FileNotFoundError):
                return (Span(path, 0, path.stat().st_size),)
            if (parts := self.parts(digest)) is not None:
                return self._locate(parts)
        raise unreadable(digest, FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))

    def parts(self, digest: Digest) -> tuple[Part, ...] | None:
        """The parts that are listed for the blob, none if the list is damaged; None if there is no list."""
        try:
            return parse_parts(self._list_path(digest).read_bytes()) or ()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise unreadable(digest, error) from error

    def verified(self, digest: Digest) -> tuple[Span, ...]:
        """Where the blob's bytes lie, after reading them all and checking them against `digest`: for readers that map.

        What this store has checked is not read again while inode, size and mtime of its files stay as they were.
        """
        try:
            try:
                return self._verified.check(digest, self.spans(digest))
            except FileNotFoundError:  # cut into parts just now
                return self._verified.check(digest, self.spans(digest))
        except OSError as error:
            raise unreadable(digest, error) from error

    def is_sound(self, digest: Digest, *, in_parts: bool = False) -> bool:
        """Whether the blob is there and has that digest; with `in_parts`, whether its parts make it up."""
        try:
            if in_parts:
                self._verified.check(digest, self._locate(self.parts(digest) or ()))
            else:
                self.verified(digest)
        except (StoreError, OSError):
            return False
        return True

    def mapped(self, digest: Digest) -> Mapped:
        """The blob's bytes where they lie, not checked. Raises StoreError if it is missing."""
        try:
            try:
                return map_spans(self.spans(digest))
            except FileNotFoundError:  # cut into parts just now
                return map_spans(self.spans(digest))
        except OSError as error:
            raise unreadable(digest, error) from error

    @contextlib.contextmanager
    def verified_beside(self, digest: Digest, blake3: str | None = None) -> Iterator[tuple[Mapped, Future[str | None]]]:
        """The blob's bytes, which another thread checks while the caller reads them.

        What the caller made of them counts once this has ended. Raises StoreError: at once if the blob is missing; in
        the end if it is damaged, in place of whatever that made the caller raise.

        blake3  of the blob, as far as known: see Verified.check_either, whose answer the check's result is
        """
        mapped = self.mapped(digest)
        with ThreadPoolExecutor(1, thread_name_prefix="blob-check") as beside:
            check = beside.submit(self._verified.check_either, digest, mapped, blake3)
            try:
                yield mapped, check
            finally:
                check.result()

    def size(self, digest: Digest) -> int | None:
        """The blob's size in bytes, or None if it, or one of its parts, is not there."""
        try:
            return self._path(digest).stat().st_size
        except FileNotFoundError:
            parts = self.parts(digest)
            return sum(part.size for part in parts) if parts and self._has_all(parts) else None

    def is_whole(self, digest: Digest) -> bool:
        """Whether the blob has a file of its own."""
        return self._path(digest).is_file()

    def delete(self, digest: Digest, *, is_list: bool = False) -> None:
        """Takes the blob's file, or the list of its parts."""
        (self._list_path(digest) if is_list else self._path(digest)).unlink(missing_ok=True)

    def files(self) -> Iterator[BlobFile]:
        """Every file of the store, lists of parts first. Those whose names are no digests are left alone."""
        yield from self.lists()
        yield from self._list("??/*", "")

    def lists(self) -> Iterator[BlobFile]:
        """The lists of parts alone."""
        yield from self._list(f"??/*{_PARTS}", _PARTS)

    def _list(self, pattern: str, suffix: str) -> Iterator[BlobFile]:
        for path in sorted(self._blobs.glob(pattern)):
            with contextlib.suppress(FileNotFoundError, NameInvalid):  # taken by a gc at this moment; a stranger
                digest = Digest(f"sha256:{path.name.removesuffix(suffix)}")
                stat = path.stat()
                yield BlobFile(digest, stat.st_size, stat.st_mtime, is_list=bool(suffix))

    def leftovers(self, *, older_than_s: float = 0.0, take: bool = False) -> list[Leftover]:
        """Files under tmp/ that no living writer holds and that are as old; with `take` they are deleted."""
        return find_leftovers(self._tmp, older_than_s, take)

    def _locate(self, parts: Iterable[Part]) -> tuple[Span, ...]:
        return tuple(Span(self._path(Digest(part.digest)), part.start, part.size) for part in parts)

    def _has_all(self, parts: Iterable[Part]) -> bool:
        return all(self._path(Digest(digest)).is_file() for digest in {part.digest for part in parts})

    def _path(self, digest: Digest) -> Path:
        return self._blobs / digest.hex[:2] / digest.hex

    def _list_path(self, digest: Digest) -> Path:
        return self._blobs / digest.hex[:2] / f"{digest.hex}{_PARTS}"

    def _make_folder(self, folder: Path) -> None:
        """Makes `folder`, and syncs each folder above that gained an entry."""
        if folder.is_dir():
            return
        self._make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def _read(span: Span) -> bytes:
    with span.path.open("rb") as file:
        file.seek(span.start)
        return file.read(span.size)
