"""Adapters in: blobs first, then the rows that name them."""

import json
import socket
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

import flora
from flora.names import Digest, Reference, check_alias, check_name
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
        while batch := list(writers.map(lambda item: _store_blobs(home, *item), islice(pairs, _BATCH))):
            with home.writing() as connection:
                for stored in batch:
                    version = _add_row(home, connection, stored, made)
                    if alias is not None:
                        reason = stored.manifest.header.recipe.operation
                        point(home, connection, version.name, alias, version.digest, reason)
                    added.append(version)
    return added


def _store_blobs(home: Home, adapter: "Adapter", name: str) -> _Stored:
    check_name(name)
    with home.reading() as connection:  # early, before megabytes are written; again under the lock
        check_binding(connection, name, adapter.header.base)
    return _Stored(adapter, name, *put_adapter(home.store, adapter))


def _add_row(home: Home, connection: sa.Connection, stored: _Stored, provenance: dict[str, Any]) -> Version:
    check_binding(connection, stored.name, stored.manifest.header.base)
    if known := index.find(connection, Reference(stored.name, digest=Digest(stored.digest))):
        return known
    _restore_if_taken(home, stored)
    version = describe_version(
        stored.manifest,
        stored.adapter.report,
        name=stored.name,
        number=index.next_number(connection, stored.name),
        digest=stored.digest,
        created_at=datetime.now(UTC),
    )
    changes.insert_version(connection, version, stored.manifest, provenance)
    created_at = version.created_at.isoformat()
    home.journal.note(connection, [Added(version.name, version.number, version.digest, created_at, provenance)])
    return version


def _restore_if_taken(home: Home, stored: _Stored) -> None:
    """Writes the blobs again if a gc took them since: it cannot now, for we hold the write lock."""
    needed = [stored.digest, *(blob.digest for blob in stored.manifest.blobs)]
    if any(home.store.size(Digest(digest)) is None for digest in needed):
        put_adapter(home.store, stored.adapter)
