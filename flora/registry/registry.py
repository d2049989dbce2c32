"""The registry's door: adapters in, versions and aliases over them, adapters out.

A write is first blobs, then the rows, committed at once, then a line in the journal. A crash at any point leaves the
index as it was before or as it is after; what it may leave besides are blobs without a row, which `gc` takes.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

import flora
from flora.adapter import AdapterHeader, ChangeReport, to_json
from flora.digests import canonical_json
from flora.errors import AdapterNotFound, AliasConflict, NotFound, UsageError
from flora.identity import BaseRecord
from flora.names import Digest, Reference, check_alias, check_name, parse_reference
from flora.registry import changes, index
from flora.registry.database import Database
from flora.registry.journal import Added, Journal, Moved, Removed
from flora.registry.manifest import Manifest, parse_manifest
from flora.registry.packing import describe_version, get_adapter, get_report, put_adapter
from flora.registry.place import current_user, locate
from flora.registry.rebuild import RebuildReport, rebuild
from flora.registry.records import UNSET, AliasMove, BaseEntry, Entry, GcReport, Problem, Unset, Version
from flora.registry.refusals import check_binding, not_found
from flora.registry.store import BlobStore, store_error

if TYPE_CHECKING:
    import sqlalchemy as sa

    from flora.adapter import Adapter

_BATCH = 256  # adapters per transaction of a bulk import
_WRITERS = 8  # threads of it


@dataclass(frozen=True, slots=True)
class _Stored:
    """An adapter whose blobs are in the store and whose row is not there yet."""

    adapter: Adapter
    name: str
    manifest: Manifest
    digest: str


class Registry:
    """One index and one blob store in one folder. Safe for threads, and for several processes at once."""

    def __init__(self, root: Path, index_file: Path) -> None:
        self.root = root
        self._store = BlobStore(root)
        self._journal = Journal(root / "journal.jsonl")
        # a new index beside an old journal is one that was lost: it is rebuilt
        self._database = Database(index_file, fill=lambda connection: rebuild(connection, self._store, self._journal))

    @classmethod
    def open(cls, url: str | Path | None = None, *, create: bool = True) -> Registry:
        """The registry in folder `url`, or with its index at `sqlite:///FILE`; None: the one that the settings name.

        Raises UsageError (another kind of URL), NotFound (not there, and create is False), StoreError.
        """
        root, index_file = locate(url)
        if not index_file.exists():
            if not create:
                raise NotFound(
                    f"there is no registry at {root}",
                    fix="`flora extract … --name NAME` makes one; --registry names another",
                )
            try:
                root.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise store_error(f"the registry folder {root} cannot be made", error) from error
        return cls(root, index_file)

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Adapters in

    def add(
        self, adapter: Adapter, name: str, *, alias: str | None = "latest", provenance: Mapping[str, Any] | None = None
    ) -> Version:
        """Stores the adapter as the next version of `name` and moves `alias` to it. Repeating it changes nothing.

        Raises NameInvalid, UsageError (the name belongs to another base), StoreError.
        """
        return self.add_many([(adapter, name)], alias=alias, provenance=provenance)[0]

    def add_many(
        self,
        items: Iterable[tuple[Adapter, str]],
        *,
        alias: str | None = "latest",
        provenance: Mapping[str, Any] | None = None,
    ) -> list[Version]:
        """`add` for many (adapter, name) pairs, with one transaction for every 256 of them.

        Blobs are written by several threads: each waits for the disk most of the time.
        """
        if alias is not None:
            check_alias(alias)
        pairs = iter(items)
        added: list[Version] = []
        with ThreadPoolExecutor(_WRITERS) as writers:
            while batch := list(writers.map(self._store_adapter, islice(pairs, _BATCH))):
                with self._changing() as connection:
                    for stored in batch:
                        added.append(self._add_row(connection, stored, alias, dict(provenance or {})))
        return added

    def _store_adapter(self, item: tuple[Adapter, str]) -> _Stored:
        adapter, name = item
        check_name(name)
        with self._database.reading() as connection:  # early, before megabytes are written; again under the lock
            check_binding(connection, name, adapter.header.base)
        return _Stored(adapter, name, *put_adapter(self._store, adapter))

    def _add_row(
        self, connection: sa.Connection, stored: _Stored, alias: str | None, provenance: dict[str, Any]
    ) -> Version:
        name, header = stored.name, stored.manifest.header
        check_binding(connection, name, header.base)
        version = index.find(connection, Reference(name, digest=Digest(stored.digest)))
        if version is None:
            self._restore_if_taken(stored)
            version = describe_version(
                stored.manifest,
                stored.adapter.report,
                name=name,
                number=index.next_number(connection, name),
                digest=stored.digest,
                created_at=datetime.now(UTC),
            )
            provenance = {"flora": flora.__version__, "host": socket.gethostname()} | provenance
            added = Added(name, version.number, version.digest, version.created_at.isoformat(), provenance)
            self._journal.note(connection, [added])
            changes.insert_version(connection, version, stored.manifest, provenance)
        if alias is not None:
            self._point(connection, name, alias, version.digest, reason=header.recipe.operation)
        return version

    def _restore_if_taken(self, stored: _Stored) -> None:
        """Writes the blobs again if a gc took them since: it cannot now, for we hold the write lock."""
        needed = [stored.digest, *(blob.digest for blob in stored.manifest.blobs)]
        if any(self._store.size(Digest(digest)) is None for digest in needed):
            put_adapter(self._store, stored.adapter)

    # Finding versions

    def resolve(self, ref: str | Reference) -> Version:
        """The version that `ref` means; a bare name means alias `prod` if it exists, else `latest`.

        Raises NameInvalid, AdapterNotFound (with `near`, names that look alike).
        """
        reference = parse_reference(ref) if isinstance(ref, str) else ref
        with self._database.reading() as connection:
            version = index.find(connection, reference)
            if version is None:
                raise not_found(connection, reference)
            return version

    def by_digest(self, version_digest: str) -> Version:
        """The version of that digest (the oldest, if several names have it). Raises NameInvalid, AdapterNotFound."""
        digest = Digest(version_digest)
        with self._database.reading() as connection:
            version = index.find_digest(connection, str(digest))
        if version is None:
            raise AdapterNotFound(f"no version here has the digest {digest}", fix="`flora ls` lists what is here")
        return version

    def names(self, *, prefix: str = "", limit: int | None = None, offset: int = 0) -> list[Entry]:
        """One entry per name, in the order of names."""
        with self._database.reading() as connection:
            return index.entries(connection, prefix, limit, offset)

    def versions(self, name: str) -> list[Version]:
        """All versions of `name`, oldest first. Raises AdapterNotFound."""
        with self._database.reading() as connection:
            found = index.versions_of(connection, check_name(name))
            if not found:
                raise not_found(connection, Reference(name))
            return found

    def aliases(self, name: str) -> dict[str, Version]:
        with self._database.reading() as connection:
            return index.aliases_of(connection, check_name(name))

    def history(self, name: str, alias: str) -> list[AliasMove]:
        """Every move of the alias, oldest first."""
        with self._database.reading() as connection:
            return index.history_of(connection, check_name(name), check_alias(alias))

    # Adapters out

    def header(self, version: Version) -> AdapterHeader:
        """All of the adapter but its numbers; reads one small blob and no torch."""
        return self._manifest(version).header

    def load(self, version: Version) -> Adapter:
        """The adapter, each of its blobs checked by sha256. Raises StoreError on damage.

        The factors are backed by the store's file maps: do not write to them.
        """
        return get_adapter(self._store, self._manifest(version))

    def report(self, version: Version) -> ChangeReport | None:
        return get_report(self._store, self._manifest(version))

    def extra(self, version: Version, filename: str) -> bytes | None:
        """The file of that name that the adapter carries, such as `chat_template.jinja`; None if it has none."""
        blob = self._manifest(version).extras.get(filename)
        return self._store.read(Digest(blob.digest)) if blob else None

    def provenance(self, version: Version) -> dict[str, Any]:
        """Where and with what this version was made; no part of its identity."""
        with self._database.reading() as connection:
            return index.provenance_of(connection, version)

    def _manifest(self, version: Version) -> Manifest:
        digest = Digest(version.digest)
        return parse_manifest(self._store.read(digest), digest)

    # Aliases and removal

    def set_alias(
        self, name: str, alias: str, version: Version, *, expected: str | Unset | None = UNSET, reason: str = ""
    ) -> None:
        """Points `alias` to `version`, if it still points to the version digest `expected` (None: does not exist yet).

        Raises NameInvalid, UsageError, AdapterNotFound (the version was removed), AliasConflict.
        """
        check_name(name)
        check_alias(alias)
        if version.name != name:
            raise UsageError(f"{version.ref} is no version of {name}", fix=f"give one of `flora show {name}`")
        with self._changing() as connection:
            if index.find(connection, Reference(name, digest=Digest(version.digest))) is None:
                raise not_found(connection, Reference(name, version=version.number))
            current = index.find(connection, Reference(name, alias=alias))
            digest = current.digest if current else None
            if expected is not UNSET and digest != expected:
                raise AliasConflict(
                    f"{name}:{alias} is {current.ref if current else 'not there'} by now",
                    cause="someone moved it since it was read",
                    fix=f"look at `flora show {name}`, then repeat the move if it is still right",
                    current=digest,
                )
            self._point(connection, name, alias, version.digest, reason)

    def remove(self, ref: str | Reference, *, force: bool = False) -> list[Version]:
        """Takes a version (`name@vN`), or with a bare name all of them, out of the index; `gc` frees the bytes.

        An alias other than `latest` protects its version unless `force`. `latest` falls back to the newest one left.
        Raises NameInvalid, UsageError (an alias, or protected by one), AdapterNotFound.
        """
        reference = parse_reference(ref) if isinstance(ref, str) else ref
        if reference.alias is not None:
            raise UsageError(
                f"{reference} is an alias, and removal is of versions",
                fix=f"name the version, as `flora show {reference.name}` lists it",
            )
        with self._changing() as connection:
            everything = index.versions_of(connection, reference.name)
            is_whole = reference.version is None and reference.digest is None
            version = None if is_whole else index.find(connection, reference)
            doomed = everything if is_whole else [version] if version else []
            if not doomed:
                raise not_found(connection, reference)
            pointers = index.aliases_of(connection, reference.name)
            aliases = {alias: target for alias, target in pointers.items() if target in doomed}
            protecting = sorted(alias for alias in aliases if alias != "latest")
            if protecting and not force:
                raise UsageError(
                    f"{reference} is in use: {aliases[protecting[0]].ref} has the alias {protecting[0]}",
                    fix="move the alias to another version first (`flora tag`), or repeat with --force",
                    aliases=protecting,
                )
            left = [version for version in everything if version not in doomed]
            for alias in aliases:
                successor = left[-1].digest if left and alias == "latest" else None
                self._point(connection, reference.name, alias, successor, reason="removal of its version")
            self._journal.note(connection, [Removed(version.name, version.number) for version in doomed])
            for version in doomed:
                changes.delete_version(connection, version)
        return doomed

    def _point(self, connection: sa.Connection, name: str, alias: str, digest: str | None, reason: str) -> None:
        current = index.find(connection, Reference(name, alias=alias))
        previous = current.digest if current else None
        if previous == digest:
            return
        move = AliasMove(name, alias, digest, previous, current_user(), reason, datetime.now(UTC))
        moved = Moved(name, alias, digest, previous, move.actor, reason, move.moved_at.isoformat())
        self._journal.note(connection, [moved])
        changes.move_alias(connection, move, target=digest)

    @contextmanager
    def _changing(self) -> Iterator[sa.Connection]:
        """A transaction whose changes the journal tells of, once they are committed."""
        with self._database.writing() as connection:
            yield connection
        with self._database.writing() as connection:
            self._journal.flush(connection)

    # Bases

    def register_base(self, record: BaseRecord, *, name: str, path: Path) -> None:
        """Keeps the base's record as a blob, and in the index where it lies on this machine."""
        self._store.put([canonical_json(to_json(record))])
        with self._database.writing() as connection:
            changes.put_base(connection, str(record.base_id), name, path.resolve())

    def bases(self) -> list[BaseEntry]:
        with self._database.reading() as connection:
            return index.base_entries(connection)

    def base_record(self, base_id: str) -> BaseRecord | None:
        """The record of that base, if it was registered here. Raises NameInvalid, StoreError."""
        digest = Digest(base_id)
        if self._store.size(digest) is None:
            return None
        return msgspec.json.decode(self._store.read(digest), type=BaseRecord)

    # Care

    def gc(self, *, dry_run: bool = False, grace_s: float = 3600.0) -> GcReport:
        """Takes blobs that nothing refers to and leftovers of crashed writes, once they are older than `grace_s`."""
        from flora.registry.collect import collect

        with self._database.writing() as connection:  # the lock keeps writers from naming what is being taken
            return collect(connection, self._store, dry_run=dry_run, grace_s=grace_s)

    def fsck(self) -> list[Problem]:
        """Every problem of index and store; changes nothing. Reads all weights."""
        from flora.registry.check import check

        with self._database.reading() as connection:
            return check(connection, self._store, self._journal)

    def reindex(self) -> RebuildReport:
        """Makes the index anew from the journal and the manifests, all or nothing."""
        with self._database.writing() as connection:
            return rebuild(connection, self._store, self._journal)
