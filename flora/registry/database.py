"""Opening the index: connections, locks, journal mode, migrations, and errors in our words.

Writers take the write lock at the start (SQLite: BEGIN IMMEDIATE; PostgreSQL: an advisory lock of the schema), so one
that must wait waits before it has read anything, and two of them never deadlock.
"""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from flora.errors import RegistryError, StoreError

HEAD = "0005"  # the newest migration; a test compares it with migrations/versions
BUSY_TIMEOUT_MS = 30_000  # a bulk import holds the write lock for about a second at a time


_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('flora.registry.' || current_schema(), 0))"


class Database:
    """The index file, brought up to date when it is opened."""

    def __init__(self, file: Path | str, fill: Callable[[sa.Connection], object]) -> None:
        """`fill` is called on a new index, in the transaction that makes its tables.

        file  SQLite's, or the URL of a PostgreSQL database
        """
        self._fill = fill
        if isinstance(file, str):
            self.file: Path | str = sa.make_url(file).render_as_string(hide_password=True)  # for messages alone
            self._engine = sa.create_engine(file, pool_pre_ping=True)
        else:
            self.file = file
            self._engine = sa.create_engine(sa.URL.create("sqlite", database=str(file)))
            sa.event.listen(self._engine, "connect", _configure)
            sa.event.listen(self._engine, "begin", _begin)
        self._is_postgres = isinstance(file, str)
        self._migrate()

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection that sees one state of the index throughout."""
        with self._translated(), self._engine.connect() as connection:
            if self._is_postgres:
                connection.execution_options(isolation_level="REPEATABLE READ")
            yield connection

    @contextmanager
    def writing(self, *, wait_ms: int | None = None) -> Iterator[sa.Connection]:
        """A transaction under the write lock: all of it is committed at the end, or on an error none.

        wait_ms  for the lock, 1 at least; None: as long as a bulk import may hold it
        """
        wait_ms = wait_ms or BUSY_TIMEOUT_MS
        with self._translated(), self._engine.connect() as connection:
            if self._is_postgres:  # what is read after the lock must be what stands then
                connection.execution_options(isolation_level="READ COMMITTED")
            else:
                connection.execution_options(flora_writes=True, flora_wait_ms=wait_ms)
            try:
                with connection.begin():
                    if self._is_postgres:
                        connection.exec_driver_sql(f"SET LOCAL lock_timeout = {wait_ms}")
                        connection.exec_driver_sql(_LOCK)
                    yield connection
            finally:
                if not self._is_postgres and wait_ms != BUSY_TIMEOUT_MS:
                    _set_wait(connection, BUSY_TIMEOUT_MS)

    def close(self) -> None:
        self._engine.dispose()

    def _migrate(self) -> None:
        with self.reading() as connection:
            if _revision(connection) == HEAD:
                return
        with self.writing() as connection:
            revision = _revision(connection)  # again: another process may have been first
            if revision != HEAD:
                _upgrade(connection, self.file)
            if revision is None:
                self._fill(connection)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            raise _translate(error, self.file) from error


def journal_mode(version: tuple[int, ...] = sqlite3.sqlite_version_info) -> str:
    """`wal` where this SQLite has the fix of the WAL-reset race, else the rollback journal.

    Versions 3.7.0 to 3.51.2 can lose data in WAL mode with two connections; 3.44.6 and 3.50.7 have the fix too.
    Source: sqlite.org/wal.html.
    """
    fixed = version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)
    return "wal" if fixed else "delete"


def _configure(connection: sqlite3.Connection, record: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves
    connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")
    (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
    if mode != journal_mode():
        connection.execute(f"PRAGMA journal_mode = {journal_mode()}")  # refused without harm while others are connected


def _begin(connection: sa.Connection) -> None:
    options = connection.get_execution_options()
    if options.get("flora_wait_ms", BUSY_TIMEOUT_MS) != BUSY_TIMEOUT_MS:
        _set_wait(connection, options["flora_wait_ms"])
    connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("flora_writes") else "BEGIN")


def _set_wait(connection: sa.Connection, wait_ms: int) -> None:
    driver = connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    driver.execute(f"PRAGMA busy_timeout = {wait_ms}")


def _revision(connection: sa.Connection) -> str | None:
    """The migration that the index stands at; None before the first."""
    if connection.dialect.name == "postgresql":
        known = connection.exec_driver_sql("SELECT 1 WHERE to_regclass('alembic_version') IS NOT NULL").first()
    else:
        known = connection.exec_driver_sql("SELECT 1 FROM sqlite_schema WHERE name = 'alembic_version'").first()
    return connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar() if known else None


def _upgrade(connection: sa.Connection, file: Path | str) -> None:
    from alembic import command  # imported only here: it costs as much as all else that a listing needs
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise RegistryError(
            f"{file} was written by a newer Flora",
            cause=str(error),
            fix="upgrade this one: pip install -U flora-adapters",
        ) from error


def _translate(error: DBAPIError, file: Path | str) -> StoreError:
    text = " ".join(str(error.orig).split())
    for part, cause, fix in (
        ("locked", f"another process has been writing to it for {BUSY_TIMEOUT_MS // 1000} s", "try again"),
        ("lock timeout", f"another process has been writing for {BUSY_TIMEOUT_MS // 1000} s", "try again"),
        ("connection failed", "the database does not answer", "check host and port, and that it runs"),
        ("authentication", "the database refuses this user", "set PGPASSWORD, or keep it in ~/.pgpass"),
        ("full", "the disk is full", "free some space and run this again: it is safe to repeat"),
        ("readonly", "the file or its folder cannot be written", "name a registry of your own with --registry"),
        ("unable to open", "its folder is missing or cannot be written", "check the path, or give another --registry"),
        ("not a database", "it is damaged", "move it aside: the next command rebuilds it from the journal"),
        ("malformed", "it is damaged", "move it aside: the next command rebuilds it from the journal"),
    ):
        if part in text:
            return StoreError(f"the registry's index {file} cannot be used", cause=f"{cause} ({text})", fix=fix)
    return StoreError(f"the registry's index {file} failed", cause=text, fix="run it again, then `flora fsck`")
