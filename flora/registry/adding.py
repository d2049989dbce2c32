"""Adapters in: blobs first, then the rows that name them."""

import json
import socket
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

import flora
from flora.adapter import BaseBinding
from flora.names import Digest, check_alias, check_name
from flora.registry import changes, index
from flora.registry.aliases import point
from flora.registry.home import Home
from flora.registry.journal import Added
from flora.registry.manifest import Manifest
from flora.registry.packing import describe_version, put_adapter
from flora.registry.records import Version
from flora.registry.refusals import check_binding

if TYPE_CHECKING:
    from flora.adapter import Adapter

_BATCH = 256  # adapters per transaction
_WRITERS = 8  # threads that write blobs: each waits for the disk most of the time


@dataclass(frozen=True, slots=True)
class _Stored:
    """An adapter whose blobs are in the store and whose row is not there yet."""

    adapter: "Adapter"
    name: str
    manifest: Manifest
    digest: str


def add_many(
    home: Home, items: Iterable[tuple["Adapter", str]], alias: str | None, provenance: Mapping[str, Any]
) -> list[Version]:
    """Adds each (adapter, name) as the next version of its name, unless that name has it, and moves the alias to it."""
    if alias is not None:
        check_alias(alias)
    made = {"flora": flora.__version__, "host": socket.gethostname()} | dict(provenance)
    made = json.loads(json.dumps(made, default=str))  # a path or a time among it is text from here on
    pairs = iter(items)
    added: list[Version] = []
    with ThreadPoolExecutor(_WRITERS) as writers:
        while batch := list(islice(pairs, _BATCH)):
            with home.reading() as connection:  # early, before megabytes are written; again under the lock
                _check_bindings(connection, [(name, adapter.header.base) for adapter, name in batch])
            stored = list(writers.map(lambda item: _store_blobs(home, *item), batch))
            with home.writing() as connection:
                versions = _add_rows(home, connection, stored, made)
                if alias is not None:
                    point(home, connection, alias, [(each.name, each.digest, each.operation) for each in versions])
            added += versions
    return added


def _check_bindings(connection: sa.Connection, wanted: Sequence[tuple[str, BaseBinding]]) -> None:
    """Raises NameInvalid, and UsageError if one of the names belongs to another base than it would get."""
    bases = index.bases_of(connection, {check_name(name) for name, _ in wanted})
    for name, base in wanted:
        known = bases.setdefault(name, [])
        check_binding(name, known, base)
        known.append((base.base_id, base.name))


def _store_blobs(home: Home, adapter: "Adapter", name: str) -> _Stored:
    return _Stored(adapter, name, *put_adapter(home.store, adapter))


def _add_rows(
    home: Home, connection: sa.Connection, batch: Sequence[_Stored], provenance: dict[str, Any]
) -> list[Version]:
    """The versions of the batch, in its order: those that were there, and rows for the others."""
    _check_bindings(connection, [(stored.name, stored.manifest.header.base) for stored in batch])
    known = index.known_versions(connection, {(stored.name, stored.digest) for stored in batch})
    numbers = index.next_numbers(connection, {stored.name for stored in batch})
    versions, new = [], []
    for stored in batch:
        version = known.get((stored.name, stored.digest))
        if version is None:
            _restore_if_taken(home, stored)
            number = numbers.get(stored.name, 1)
            version = _describe(stored, number)
            numbers[stored.name] = number + 1
            known[stored.name, stored.digest] = version
            new.append((version, stored.manifest, provenance))
        versions.append(version)
    if new:
        changes.insert_versions(connection, new)
        home.journal.note(
            connection,
            [Added(each.name, each.number, each.digest, each.created_at.isoformat(), provenance) for each, _, _ in new],
        )
    return versions


def _describe(stored: _Stored, number: int) -> Version:
    return describe_version(
        stored.manifest,
        stored.adapter.report,
        name=stored.name,
        number=number,
        digest=stored.digest,
        created_at=datetime.now(UTC),
    )


def _restore_if_taken(home: Home, stored: _Stored) -> None:
    """Writes the blobs again if a gc took them since: it cannot now, for we hold the write lock."""
    needed = [stored.digest, *(blob.digest for blob in stored.manifest.blobs)]
    if any(home.store.size(Digest(digest)) is None for digest in needed):
        put_adapter(home.store, stored.adapter)
