"""Reindex: the index made anew from the journal, which knows the names, and the manifests, which know the rest."""

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from flora.errors import StoreError
from flora.names import Digest, Reference
from flora.registry import changes, index
from flora.registry.journal import Added, Journal, Labeled, Mismatched, Moved, Protected, live_versions
from flora.registry.manifest import parse_manifest
from flora.registry.packing import describe_version, get_report, shareable_tensors
from flora.registry.records import AliasMove, Mismatch
from flora.registry.store import BlobStore


@dataclass(frozen=True, slots=True)
class RebuildReport:
    num_versions: int
    skipped: tuple[str, ...]  # name@vN of the journal whose manifest or report is missing or damaged


def rebuild(connection: sa.Connection, store: BlobStore, journal: Journal) -> RebuildReport:
    """Fills the emptied tables from the journal; bases keep their places. The caller holds the write lock."""
    journal.flush(connection)
    history = journal.read()
    changes.clear(connection)
    found, skipped = set(), []
    for added in live_versions(history):
        try:
            _insert(connection, store, added)
            found.add((added.name, added.digest))
        except StoreError:
            skipped.append(f"{added.name}@v{added.number}")
    for change in history:
        if isinstance(change, Added):
            changes.reserve_numbers(connection, [(change.name, change.number)])
        elif isinstance(change, Moved):
            moved_at = datetime.fromisoformat(change.moved_at)
            move = AliasMove(
                change.name, change.alias, change.digest, change.previous, change.actor, change.reason, moved_at
            )
            target = change.digest if (change.name, change.digest) in found else None
            changes.move_aliases(connection, [(move, target)])
        elif isinstance(change, Labeled):
            reference = Reference(change.name, version=change.number)
            if version := index.find(connection, reference):
                changes.set_label(connection, version, change.key, change.value)
        elif isinstance(change, Mismatched):
            mismatch = Mismatch(change.base_id, change.actor, datetime.fromisoformat(change.allowed_at))
            if version := index.find(connection, Reference(change.name, version=change.number)):
                changes.put_mismatch(connection, version, mismatch)
        elif isinstance(change, Protected):
            changes.set_protection(connection, change.name, change.alias, change.is_protected)
    journal.resume(connection)
    return RebuildReport(len(found), tuple(skipped))


def _insert(connection: sa.Connection, store: BlobStore, added: Added) -> None:
    digest = Digest(added.digest)
    manifest = parse_manifest(store.read(digest), digest)
    version = describe_version(
        manifest,
        get_report(store, manifest),
        name=added.name,
        number=added.number,
        digest=added.digest,
        created_at=datetime.fromisoformat(added.created_at),
    )
    changes.insert_versions(connection, [(version, manifest, added.provenance)], blake3={})
    changes.note_tensors(connection, {manifest.weights.digest: shareable_tensors(store, manifest)})
