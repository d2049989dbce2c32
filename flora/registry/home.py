"""A registry's parts, held together: its folder, the blobs, the index, the journal."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from flora.errors import NotFound
from flora.names import Digest
from flora.registry.database import Database
from flora.registry.disk import store_error
from flora.registry.journal import Journal
from flora.registry.manifest import Manifest, parse_manifest
from flora.registry.place import locate
from flora.registry.rebuild import rebuild
from flora.registry.records import Version
from flora.registry.store import BlobStore

_SOON_MS = 10  # a load waits for it, once, that has just taken ten times as long


class Home:
    """What every operation on a registry is given."""

    def __init__(self, root: Path, index_file: Path | str) -> None:
        """index_file  SQLite's file, or the URL of a PostgreSQL database"""
        self.root = root
        self.store = BlobStore(root)
        self.journal = Journal(root / "journal.jsonl")
        # a new index beside an old journal is one that was lost: it is rebuilt
        self._database = Database(index_file, fill=lambda connection: rebuild(connection, self.store, self.journal))

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection that sees one state of the index throughout. Keep it short: it makes writers wait."""
        with self._database.reading() as connection:
            yield connection

    @contextmanager
    def noting(self) -> Iterator[sa.Connection]:
        """A transaction for what is no loss if it is not written. Raises StoreError unless the lock is free soon."""
        with self._database.writing(wait_ms=_SOON_MS) as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction under the write lock, all or nothing; then the journal is told what it noted."""
        with self._database.writing() as connection:
            yield connection
        with self._database.reading() as connection:
            if not self.journal.has_pending(connection):
                return
        with self._database.writing() as connection:
            self.journal.flush(connection)

    def manifest(self, version: Version) -> Manifest:
        digest = Digest(version.digest)
        return parse_manifest(self.store.read(digest), digest)

    def close(self) -> None:
        self._database.close()


def open_home(url: str | Path | None, *, create: bool) -> Home:
    """The parts of the registry that `url` means (see place.locate), made where they are missing.

    Raises UsageError (another kind of URL), NotFound (not there, and create is False), StoreError.
    """
    root, index_file = locate(url)
    if isinstance(index_file, str) or not index_file.exists():
        if not create and not isinstance(index_file, str):
            raise NotFound(
                f"there is no registry at {root}",
                fix="`flora extract … --name NAME` makes one; --registry names another",
            )
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise store_error(f"the registry folder {root} cannot be made", error) from error
    return Home(root, index_file)
