"""Writes in progress: files held by a lock that ends with their writer, and those that a crash has left."""

import contextlib
import fcntl
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO


@dataclass(frozen=True, slots=True)
class Leftover:
    """A file under tmp/ whose writer is gone."""

    name: str
    size: int  # bytes


def create_locked(path: Path) -> BinaryIO:
    """A new file, held by a lock that ends with its writer: what `find_leftovers` finds unlocked, a crash has left."""
    while True:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)  # a blob never changes after this
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return os.fdopen(descriptor, "wb")
        os.close(descriptor)  # a gc came between creating and locking, and took it


def find_leftovers(folder: Path, older_than_s: float, take: bool) -> list[Leftover]:
    """Files in the folder that no living writer holds and that are as old; with `take` they are deleted."""
    limit = time.time() - older_than_s
    found = []
    for path in sorted(folder.glob("*")):
        with contextlib.suppress(OSError), path.open("rb") as file:  # OSError: held, or renamed at this moment
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stat = os.fstat(file.fileno())
            if stat.st_mtime <= limit:
                if take:
                    path.unlink()
                found.append(Leftover(path.name, stat.st_size))
    return found
