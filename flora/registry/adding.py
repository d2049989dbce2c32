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
from flora.registry import changes, lookups
from flora.registry.aliases import point
from flora.registry.home import Home
from flora.registry.journal import Added
from flora.registry.packing import Packed, describe_version, put_adapter
from flora.registry.records import Version
from flora.registry.refusals import check_binding
from flora.registry.sharing import share

if TYPE_CHECKING:
    from flora.adapter import Adapter

_BATCH = 256  # adapters per transaction
_WRITERS = 8  # threads that write blobs: each waits for the disk most of the time


@dataclass(frozen=True, slots=True)
class _Stored:
    """An adapter whose blobs are in the store and whose row is not there yet."""

    adapter: "Adapter"
    name: str
    packed: Packed


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
            share(home, {each.packed.manifest.weights.digest for each in stored if each.packed.tensors})
    return added


def _check_bindings(connection: sa.Connection, wanted: Sequence[tuple[str, BaseBinding]]) -> None:
    """Raises NameInvalid, and UsageError if one of the names belongs to another base than it would get."""
    bases = lookups.bases_of(connection, {check_name(name) for name, _ in wanted})
    for name, base in wanted:
        known = bases.setdefault(name, [])
        check_binding(name, known, base)
        known.append((base.base_id, base.name))


def _store_blobs(home: Home, adapter: "Adapter", name: str) -> _Stored:
    return _Stored(adapter, name, put_adapter(home.store, adapter))


def _add_rows(
    home: Home, connection: sa.Connection, batch: Sequence[_Stored], provenance: dict[str, Any]
) -> list[Version]:
    """The versions of the batch, in its order: those that were there, and rows for the others."""
    _check_bindings(connection, [(stored.name, stored.packed.manifest.header.base) for stored in batch])
    known = lookups.known_versions(connection, {(stored.name, stored.packed.digest) for stored in batch})
    numbers = lookups.next_numbers(connection, {stored.name for stored in batch})
    versions, new = [], []
    for stored in batch:
        _complete(home, stored)
        version = known.get((stored.name, stored.packed.digest))
        if version is None:
            number = numbers.get(stored.name, 1)
            version = _describe(stored, number)
            numbers[stored.name] = number + 1
            known[stored.name, stored.packed.digest] = version
            new.append((version, stored.packed.manifest, provenance))
        versions.append(version)
    if new:
        blake3 = {stored.packed.manifest.weights.digest: stored.packed.blake3 for stored in batch}
        changes.insert_versions(connection, new, blake3)
        home.journal.note(
            connection,
            [Added(each.name, each.number, each.digest, each.created_at.isoformat(), provenance) for each, _, _ in new],
        )
    changes.note_tensors(connection, {each.packed.manifest.weights.digest: each.packed.tensors for each in batch})
    return versions


def _describe(stored: _Stored, number: int) -> Version:
    return describe_version(
        stored.packed.manifest,
        stored.adapter.report,
        name=stored.name,
        number=number,
        digest=stored.packed.digest,
        created_at=datetime.now(UTC),
    )


def _complete(home: Home, stored: _Stored) -> None:
    """Lets the parts of the weights count; writes what a gc took since. It cannot now, for we hold the write lock."""
    manifest, parts = stored.packed.manifest, stored.packed.parts
    is_there = parts is None or home.store.replace_by_parts(Digest(manifest.weights.digest), parts)
    needed = [stored.packed.digest, *(blob.digest for blob in manifest.blobs)]
    if not is_there or any(home.store.size(Digest(digest)) is None for digest in needed):
        put_adapter(home.store, stored.adapter, is_whole=True)
