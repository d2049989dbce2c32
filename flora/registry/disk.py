"""What a disk refuses, in our words; and what makes a folder's entries durable."""

import errno
import os
from pathlib import Path

from flora.errors import StoreError
from flora.names import Digest

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


def unreadable(digest: Digest, error: OSError) -> StoreError:
    """The StoreError of a blob that is missing, or cannot be read."""
    if isinstance(error, FileNotFoundError):
        return StoreError(
            f"blob {digest} is missing from the store",
            cause="a file was deleted by hand, or a copy of the registry is incomplete",
            fix="`flora fsck` lists what is affected; extract or import that adapter again",
            digest=str(digest),
        )
    return store_error(f"blob {digest} cannot be read", error)


def damaged(digest: Digest) -> StoreError:
    """The StoreError of a blob whose bytes are not those of its name."""
    return StoreError(
        f"blob {digest} is damaged: its bytes have another sha256",
        cause="the disk or a copy changed it after it was written",
        fix="`flora fsck` lists what is affected; extract or import that adapter again, which replaces the blob",
        digest=str(digest),
    )
