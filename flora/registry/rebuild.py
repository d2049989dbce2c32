"""Reindex: the index made anew from the journal, which knows the names, and the manifests, which know the rest."""

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from flora.errors import StoreError
from flora.names import Digest
from flora.registry import changes
from flora.registry.journal import Added, Journal, Moved, live_versions
from flora.registry.manifest import parse_manifest
from flora.registry.packing import describe_version, get_report
from flora.registry.records import AliasMove
from flora.registry.store import BlobStore


@dataclass(frozen=True, slots=True)
class RebuildReport:
    num_versions: int
    skipped: tuple[str, ...]  # name@vN of the journal whose manifest is missing or damaged
    num_torn_lines: int


def rebuild(connection: sa.Connection, store: BlobStore, journal: Journal) -> RebuildReport:
    """Fills the emptied tables from the journal; bases keep their places."""
    lines, num_torn = journal.read()
    added, skipped = live_versions(lines), []
    changes.clear(connection)
    digests: set[tuple[str, str]] = set()
    for addition in added:
        digest = Digest(addition.digest)
        try:
            manifest = parse_manifest(store.read(digest), digest)
            report = get_report(store, manifest)
        except StoreError:
            skipped.append(f"{addition.name}@v{addition.number}")
            continue
        created_at = datetime.fromisoformat(addition.created_at)
        version = describe_version(
            manifest, report, name=addition.name, number=addition.number, digest=addition.digest, created_at=created_at
        )
        changes.insert_version(connection, version, manifest, addition.provenance)
        digests.add((addition.name, addition.digest))
    for line in lines:
        if isinstance(line, Added):
            changes.reserve_number(connection, line.name, line.number)
        elif isinstance(line, Moved):
            target = line.digest if (line.name, line.digest) in digests else None
            moved_at = datetime.fromisoformat(line.moved_at)
            move = AliasMove(line.name, line.alias, line.digest, line.previous, line.actor, line.reason, moved_at)
            changes.move_alias(connection, move, target=target)
    return RebuildReport(len(digests), tuple(skipped), num_torn)
