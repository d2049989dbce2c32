"""The journal: which names, versions and aliases were given, one JSON line each, only ever appended to.

Manifests know no names, so an index rebuilt from them alone would be nameless. A line is first a row of the index,
committed together with the change that it tells of, and is written to the file right after. So the file never says what
did not happen; what a crash keeps from it, the next change writes. A line written twice counts once, by its number.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa

from flora.registry.disk import store_error, sync_folder
from flora.registry.tables import journal_lines


class Added(msgspec.Struct, frozen=True, tag="add", tag_field="op"):
    name: str
    number: int
    digest: str  # of the manifest
    created_at: str  # ISO 8601, UTC
    provenance: dict[str, Any]


class Moved(msgspec.Struct, frozen=True, tag="alias", tag_field="op"):
    name: str
    alias: str
    digest: str | None  # None: removed
    previous: str | None
    actor: str
    reason: str
    moved_at: str


class Removed(msgspec.Struct, frozen=True, tag="remove", tag_field="op"):
    name: str
    number: int


class Labeled(msgspec.Struct, frozen=True, tag="label", tag_field="op"):
    name: str
    number: int
    key: str
    value: str | None  # None: taken away


class Protected(msgspec.Struct, frozen=True, tag="protect", tag_field="op"):
    name: str
    alias: str
    is_protected: bool


class Mismatched(msgspec.Struct, frozen=True, tag="mismatch", tag_field="op"):
    name: str
    number: int
    base_id: str  # of the base that was served, which is not the version's
    actor: str
    allowed_at: str


Change = Added | Moved | Removed | Labeled | Protected | Mismatched


class Event(msgspec.Struct, frozen=True):
    """A change, and where in the journal it ends."""

    change: Change
    cursor: int  # to go on from


class _Line(msgspec.Struct, frozen=True):
    id: int
    change: Change


class Journal:
    """The journal of one registry. All but `read` is for the holder of the index's write lock."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, connection: sa.Connection, changes: Sequence[Change]) -> None:
        """Makes the changes part of the caller's transaction; `flush` writes them to the file once it is committed."""
        texts = [{"change": msgspec.json.encode(change).decode()} for change in changes]
        connection.execute(journal_lines.insert(), texts)

    def flush(self, connection: sa.Connection) -> None:
        """Writes noted changes to the file, durably. Raises StoreError: the changes hold, and stay noted."""
        rows = connection.execute(sa.select(journal_lines).order_by(journal_lines.c.id)).all()
        if rows:
            self._append(b"".join(b'{"id":%d,"change":%s}\n' % (row.id, row.change.encode()) for row in rows))
            connection.execute(journal_lines.delete().where(journal_lines.c.id <= rows[-1].id))

    def resume(self, connection: sa.Connection) -> None:
        """Lets a new index number its lines after those of the file."""
        last = max(self._lines(), default=1)
        connection.execute(journal_lines.insert().values(id=last, change=""))
        connection.execute(journal_lines.delete())
        if connection.dialect.name == "postgresql":  # a sequence takes no notice of numbers that it did not give
            connection.exec_driver_sql(f"SELECT setval(pg_get_serial_sequence('journal_lines', 'id'), {last:d})")

    def read(self) -> list[Change]:
        """Every change in the file, in order. What a crash tore is passed over: the next flush wrote it again."""
        return list(self._lines().values())

    def follow(self, cursor: int) -> Iterator[Event]:
        """The changes that the file tells after `cursor` (0: from the start), each once, in order.

        A line that is still being written is left for the next call.
        """
        if not self.path.exists():
            return
        decoder = msgspec.json.Decoder(_Line)
        last = 0  # what a crash let be written twice stands close together
        with self.path.open("rb") as file:
            file.seek(cursor)
            for text in file:
                if not text.endswith(b"\n"):
                    return
                cursor += len(text)
                try:
                    line = decoder.decode(text)
                except (msgspec.DecodeError, UnicodeDecodeError):
                    continue
                if line.id > last:
                    last = line.id
                    yield Event(line.change, cursor)

    def pending(self, connection: sa.Connection) -> list[Change]:
        """Changes that are committed and not in the file yet, because a crash came between."""
        rows = connection.execute(sa.select(journal_lines.c.change).order_by(journal_lines.c.id))
        return [msgspec.json.decode(row.change, type=Change) for row in rows]

    def has_pending(self, connection: sa.Connection) -> bool:
        return connection.execute(sa.select(journal_lines.c.id).limit(1)).first() is not None

    def _append(self, data: bytes) -> None:
        try:
            is_new = not self.path.exists()
            with self.path.open("ab") as file:
                file.write(data if is_new or self._ends_whole() else b"\n" + data)
                file.flush()
                os.fsync(file.fileno())
            if is_new:
                sync_folder(self.path.parent)
        except OSError as error:
            raise store_error(f"{self.path} cannot be written", error) from error

    def _lines(self) -> dict[int, Change]:
        if not self.path.exists():
            return {}
        decoder = msgspec.json.Decoder(_Line)
        lines: dict[int, Change] = {}
        with self.path.open("rb") as file:
            for text in file:
                try:
                    line = decoder.decode(text)
                except (msgspec.DecodeError, UnicodeDecodeError):
                    continue
                lines.setdefault(line.id, line.change)
        return lines

    def _ends_whole(self) -> bool:
        with self.path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return True
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


def live_versions(changes: Iterable[Change]) -> list[Added]:
    """What was added and not removed."""
    live: dict[tuple[str, int], Added] = {}
    for change in changes:
        if isinstance(change, Added):
            live[change.name, change.number] = change
        elif isinstance(change, Removed):
            live.pop((change.name, change.number), None)
    return list(live.values())
