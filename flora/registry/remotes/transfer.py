"""Files from a remote to a folder: resumed where a run broke off, capped, timed, and verified by digest on arrival."""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from flora.errors import RemoteError
from flora.registry.disk import store_error
from flora.registry.remotes.remote import Interrupted, Listing, Remote, RemoteFile

GIB = 1 << 30
_READ_BYTES = 1 << 20
_LEAST_RATE = 1024  # bytes/s: a stream slower than this over a whole stall time counts as stalled
_MAX_WAIT_S = 60.0  # however long a remote asks us to wait
_PART = ".part"  # a file that is not whole, or not verified yet


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a pull may fetch, and how patient it is."""

    max_bytes: int = 16 * GIB  # of all files together
    stall_s: float = 30.0  # without a byte, or below 1 KiB/s
    num_attempts: int = 5  # that bring nothing, in a row
    first_wait_s: float = 0.5  # between attempts; doubles


Report = Callable[[float, str], None]  # (share done, what is at hand)


def fetch(
    remote: Remote, listing: Listing, names: Iterable[str], folder: Path, limits: Limits, report: Report
) -> list[Path]:
    """Brings the files of those names into `folder`, and returns them. What is there already is not fetched again.

    A file stands under its name only when it is whole and has the digest that the remote told.
    Raises RemoteError (too large, stalled, digest), AuthError, NotFound, StoreError (the folder cannot be written).
    """
    files = [file for name in names if (file := listing.file(name)) is not None]
    total = sum(file.num_bytes for file in files)
    if total > limits.max_bytes:
        raise RemoteError(
            f"{remote.address} has {total} bytes of adapter files, more than the {limits.max_bytes} that may be pulled",
            fix="if that is what you want, give a larger --max-size",
        )
    done = 0

    def tell(num_bytes: int) -> None:
        report((done + num_bytes) / (total or 1), current.name)

    paths = []
    for current in files:
        paths.append(_fetch(remote, listing, current, folder, limits, tell))
        done += current.num_bytes
    return paths


def _fetch(
    remote: Remote, listing: Listing, file: RemoteFile, folder: Path, limits: Limits, report: Callable[[int], None]
) -> Path:
    path, part = folder / file.name, folder / (file.name + _PART)
    if path.exists():  # verified by an earlier run: the folder belongs to one revision
        return path
    failures, is_second = 0, False
    while True:
        before = _size(part)
        try:
            _append(remote, listing, file, part, limits, report)
        except Interrupted as error:
            failures = 1 if _size(part) - before > _READ_BYTES else failures + 1
            if failures >= limits.num_attempts:
                raise RemoteError(
                    f"{file.name} of {remote.address} broke off at {_size(part)} of {file.num_bytes} bytes",
                    cause=f"{failures} attempts in a row brought nothing more; the last: {error}",
                    fix="run the same command again: it goes on where this one stopped",
                ) from error
            wait_s = error.retry_after_s or limits.first_wait_s * 2 ** (failures - 1)
            time.sleep(min(wait_s, _MAX_WAIT_S))
            continue
        if (wrong := _wrong_digest(part, file)) is None:
            part.replace(path)
            return path
        part.unlink()
        if is_second or before == 0:  # else the earlier part may have been another file's: once more from the start
            raise RemoteError(
                f"{file.name} of {remote.address} is not what it says it is",
                cause=wrong,
                fix="fetch it again later; if it stays so, the remote's copy is damaged: tell its owner",
            )
        is_second = True


def _append(
    remote: Remote, listing: Listing, file: RemoteFile, part: Path, limits: Limits, report: Callable[[int], None]
) -> None:
    """Goes on with `part` to the file's full size. Raises Interrupted if the stream ends or stalls before that."""
    with contextlib.suppress(FileNotFoundError):
        if part.stat().st_size > file.num_bytes:
            part.unlink()
    try:
        with part.open("ab") as target:
            size = target.tell()
            if size == file.num_bytes:
                return
            window_s, window_size = time.monotonic(), size
            for piece in remote.read(listing, file, size, limits.stall_s):
                size += len(piece)
                if size > file.num_bytes:
                    raise RemoteError(
                        f"{file.name} of {remote.address} is longer than the {file.num_bytes} bytes it claimed",
                        fix="do not trust this remote's copy; ask its owner",
                    )
                target.write(piece)
                report(size)
                now_s = time.monotonic()
                if now_s - window_s >= limits.stall_s:
                    if size - window_size < _LEAST_RATE * limits.stall_s:
                        raise Interrupted(f"{size - window_size} bytes came in {now_s - window_s:.0f} s")
                    window_s, window_size = now_s, size
    except OSError as error:
        raise store_error(f"{part.parent} cannot be written", error) from error
    if size < file.num_bytes:
        raise Interrupted(f"the stream ended at {size} of {file.num_bytes} bytes")


def _wrong_digest(path: Path, file: RemoteFile) -> str | None:
    """What is wrong with the bytes at `path`, if anything is."""
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % file.num_bytes, usedforsecurity=False)
    with path.open("rb") as opened:
        while piece := opened.read(_READ_BYTES):
            sha256.update(piece)
            if file.git_sha1:
                sha1.update(piece)
    if file.sha256 and sha256.hexdigest() != file.sha256:
        return f"its sha256 is {sha256.hexdigest()}; the remote's own record says {file.sha256}"
    if not file.sha256 and file.git_sha1 and sha1.hexdigest() != file.git_sha1:
        return f"its git object id is {sha1.hexdigest()}; the remote's own record says {file.git_sha1}"
    return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
