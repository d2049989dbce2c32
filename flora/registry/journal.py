"""The journal: which names, versions and aliases were given, one JSON line each, only ever appended to.

Manifests know no names, so an index rebuilt from them alone would be nameless. A line is on the disk before its row is
committed: what the index knows, the journal knows too. A crash between the two leaves a line without a row, which
nobody was told of; a later line for the same number then takes its place.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from flora.registry.store import store_error


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


Line = Added | Moved | Removed


class Journal:
    """The lines of one registry. Appending is for the holder of the index's write lock alone."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, lines: Sequence[Line]) -> None:
        """Writes the lines durably. Raises StoreError; part of a line may then be left, which `read` passes over."""
        try:
            is_new = not self.path.exists()
            with self.path.open("ab") as file:
                torn = b"" if is_new or self._ends_whole() else b"\n"
                file.write(torn + b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
                file.flush()
                os.fsync(file.fileno())
            if is_new:
                descriptor = os.open(self.path.parent, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        except OSError as error:
            raise store_error(f"{self.path} cannot be written", error) from error

    def read(self) -> tuple[list[Line], int]:
        """Every whole line in order, and the number of those that cannot be read: torn by a crash, or damaged."""
        lines: list[Line] = []
        num_torn = 0
        if not self.path.exists():
            return lines, num_torn
        decoder = msgspec.json.Decoder(Line)
        with self.path.open("rb") as file:
            for text in file:
                try:
                    lines.append(decoder.decode(text))
                except (msgspec.DecodeError, UnicodeDecodeError):
                    num_torn += 1
        return lines, num_torn

    def _ends_whole(self) -> bool:
        with self.path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return True
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


def live_versions(lines: list[Line]) -> list[Added]:
    """What was added and not removed; of two lines for one number the later one holds."""
    live: dict[tuple[str, int], Added] = {}
    for line in lines:
        if isinstance(line, Added):
            live[line.name, line.number] = line
        elif not isinstance(line, Moved):
            live.pop((line.name, line.number), None)
    return list(live.values())
