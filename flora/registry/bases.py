"""Bases: the record of each as a blob, and in the index where it lies on this machine."""

from pathlib import Path

import msgspec

from flora.adapter import to_json
from flora.canonical import canonical_json
from flora.identity import BaseRecord
from flora.names import Digest
from flora.registry import changes
from flora.registry.home import Home


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
