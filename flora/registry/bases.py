"""Bases: the record of each as a blob, and in the index where it lies on this machine."""

from pathlib import Path

import msgspec

from flora.adapter import to_json
from flora.canonical import canonical_json
from flora.identity import BaseRecord
from flora.names import Digest
from flora.registry import changes, index
from flora.registry.binding import belongs
from flora.registry.home import Home
from flora.registry.records import Version


def register_base(home: Home, record: BaseRecord, *, name: str, path: Path) -> None:
    home.store.put([canonical_json(to_json(record))])
    with home.writing() as connection:
        changes.put_base(connection, str(record.base_id), name, path.resolve())


def base_record(home: Home, base_id: str) -> BaseRecord | None:
    """The record of that base, if it was registered here. Raises NameInvalid, StoreError."""
    digest = Digest(base_id)
    if home.store.size(digest) is None:
        return None
    return msgspec.json.decode(home.store.read(digest), type=BaseRecord)


def is_base_proven(home: Home, version: Version) -> bool:
    """Whether the version's base was registered here, and by its own record has a place for all of the version.

    An adapter's author writes what base id he likes, and could carry a made-up record as one of its files: a blob of
    that digest is no proof. Raises StoreError.
    """
    if version.base_id is None:
        return False
    with home.reading() as connection:
        is_registered = index.is_registered_base(connection, version.base_id)
    record = base_record(home, version.base_id) if is_registered else None
    return record is not None and belongs(home.manifest(version).header, record)
