"""What a remote is: a place that shows an adapter's files, reads them from any byte on, and takes a folder of them.

    Hub  hub.py      folder  folder.py      S3, GCS, Azure  bucket.py      OCI registry  oci.py

A backend knows its own requests and errors and nothing else. Retries, resuming, caps and digests are in `transfer.py`,
the same for all.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Interrupted(Exception):
    """A request that broke off, and may go well when it is repeated: a timeout, a broken body, status 429 or 5xx."""

    def __init__(self, reason: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s  # what the remote asked for


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file as the remote describes it. Its digest is what a copy must have; None: the remote knows of none."""

    name: str
    num_bytes: int
    sha256: str | None = None  # hex
    git_sha1: str | None = None  # hex, of git's blob object: how the Hub identifies small files
    key: str = ""  # where it lies there, if that is not its name


@dataclass(frozen=True, slots=True)
class Listing:
    """One immutable state of an adapter on a remote: reading a file of it never gives bytes of another state."""

    revision: str  # a commit, a manifest's digest, a version; "" if the remote has no such thing
    files: tuple[RemoteFile, ...]

    def file(self, name: str) -> RemoteFile | None:
        return next((file for file in self.files if file.name == name), None)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A folder of files to publish as one state, together or not at all."""

    folder: Path
    names: tuple[str, ...]
    message: str
    owned: frozenset[str]  # names that publishing replaces or takes away; a remote's other files stay
    is_private: bool = False  # where the remote makes a new repository for it


class Remote(Protocol):
    """One adapter's address on a remote. Methods raise AuthError, NotFound, RemoteError; reading also Interrupted."""

    address: str

    def look(self, revision: str | None = None) -> Listing:
        """What is there now, or at `revision`."""

    def read(self, listing: Listing, file: RemoteFile, offset: int, timeout_s: float) -> Iterator[bytes]:
        """The file's bytes from `offset` on. Raises Interrupted if none comes for `timeout_s`."""

    def publish(self, outgoing: Outgoing) -> str:
        """Makes the folder the newest state; returns its address. Repeating it after a failure is safe."""
