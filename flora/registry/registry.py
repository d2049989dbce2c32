"""The registry's door: adapters in, versions and aliases over them, adapters out.

A write is first blobs, then the rows, committed at once, then a line in the journal. A crash at any point leaves the
index as it was before or as it is after; what it may leave besides are blobs without a row, which `gc` takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flora.errors import AdapterNotFound
from flora.names import Digest, Reference, check_alias, check_name, parse_reference
from flora.registry import adding, aliases, bases, index, labels, listing, mismatches, removal
from flora.registry.home import Home, open_home
from flora.registry.lineage import lineage
from flora.registry.loading import loading
from flora.registry.packing import get_adapter, get_report
from flora.registry.records import (
    UNSET,
    AliasMove,
    BaseEntry,
    Entry,
    GcReport,
    Mismatch,
    Problem,
    Search,
    Unset,
    Version,
)
from flora.registry.refusals import not_found
from flora.registry.sharing import shared_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from flora.adapter import Adapter, AdapterHeader, ChangeReport
    from flora.identity import BaseRecord
    from flora.registry.journal import Event
    from flora.registry.leases import Lease
    from flora.registry.lineage import Ancestor
    from flora.registry.rebuild import RebuildReport


class Registry:
    """One index and one blob store in one folder. Safe for threads, and for several processes at once."""

    def __init__(self, home: Home) -> None:
        self._home = home

    @property
    def root(self) -> Path:
        return self._home.root

    @classmethod
    def open(cls, url: str | Path | None = None, *, create: bool = True) -> Registry:
        """The registry in folder `url`, with its index at `sqlite:///FILE` or `postgresql://…?blobs=FOLDER`; None: the
        one that the settings name.

        Raises UsageError (another kind of URL), NotFound (not there, and create is False), StoreError.
        """
        return cls(open_home(url, create=create))

    def close(self) -> None:
        self._home.close()

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
        """`add` for many (adapter, name) pairs: several are written at a time, and a transaction takes 256 of them."""
        return adding.add_many(self._home, items, alias, provenance or {})

    # Finding versions

    def resolve(self, ref: str | Reference) -> Version:
        """The version that `ref` means; a bare name means alias `prod` if it exists, else `latest`.

        Raises NameInvalid, AdapterNotFound (with `near`, names that look alike).
        """
        reference = parse_reference(ref) if isinstance(ref, str) else ref
        with self._home.reading() as connection:
            version = index.find(connection, reference)
            if version is None:
                raise not_found(connection, reference)
            return version

    def by_digest(self, version_digest: str) -> Version:
        """The version of that digest (the oldest, if several names have it). Raises NameInvalid, AdapterNotFound."""
        digest = Digest(version_digest)
        with self._home.reading() as connection:
            version = index.find_digest(connection, str(digest))
        if version is None:
            raise AdapterNotFound(f"no version here has the digest {digest}", fix="`flora ls` lists what is here")
        return version

    def names(self, *, prefix: str = "", limit: int | None = None, after: str = "") -> list[Entry]:
        """One entry per name, in the order of names; the next page begins after the last name of the one before."""
        with self._home.reading() as connection:
            return listing.entries(connection, prefix, limit, after)

    def versions(self, name: str) -> list[Version]:
        """All versions of `name`, oldest first. Raises AdapterNotFound."""
        with self._home.reading() as connection:
            found = index.versions_of(connection, check_name(name))
            if not found:
                raise not_found(connection, Reference(name))
            return found

    def aliases(self, name: str) -> dict[str, Version]:
        with self._home.reading() as connection:
            return index.aliases_of(connection, check_name(name))

    def history(self, name: str, alias: str) -> list[AliasMove]:
        """Every move of the alias, oldest first."""
        with self._home.reading() as connection:
            return index.history_of(connection, check_name(name), check_alias(alias))

    # Adapters out

    def header(self, version: Version) -> AdapterHeader:
        """All of the adapter but its numbers; reads one small blob and no torch."""
        return self._home.manifest(version).header

    def load(self, version: Version) -> Adapter:
        """The adapter, each of its blobs checked by sha256. Raises StoreError on damage.

        The factors are backed by the store's file maps: do not write to them.
        """
        return get_adapter(self._home.store, self._home.manifest(version))

    def loading(self, version: Version) -> AbstractContextManager[Adapter]:
        """As load, with the weights checked by another thread while the caller copies them, by BLAKE3 where known.

        What the caller made of them counts once the context has ended without a StoreError.
        """
        return loading(self._home, version)

    def report(self, version: Version) -> ChangeReport | None:
        return get_report(self._home.store, self._home.manifest(version))

    def extra(self, version: Version, filename: str) -> bytes | None:
        """The file of that name that the adapter carries, such as `chat_template.jinja`; None if it has none."""
        blob = self._home.manifest(version).extras.get(filename)
        return self._home.store.read(Digest(blob.digest)) if blob else None

    def provenance(self, version: Version) -> dict[str, Any]:
        """Where and with what this version was made; no part of its identity."""
        with self._home.reading() as connection:
            return index.provenance_of(connection, version)

    def shared_bytes(self, version: Version) -> int:
        """How many bytes of its weights are stored once for it and others: large tensors that others have too."""
        return shared_bytes(self._home, version)

    # Aliases and removal

    def set_alias(
        self,
        name: str,
        alias: str,
        version: Version,
        *,
        expected: str | Unset | None = UNSET,
        reason: str = "",
        force: bool = False,
    ) -> None:
        """Points `alias` to `version`, if it still points to the version digest `expected` (None: does not exist yet).

        A protected alias moves only with `force`.
        Raises NameInvalid, UsageError, AdapterNotFound (the version was removed), AliasConflict.
        """
        aliases.set_alias(self._home, name, alias, version, expected, reason, force=force)

    def protect(self, name: str, alias: str, *, is_protected: bool = True) -> None:
        """Keeps the alias from being moved without force, or with False no longer. Raises UsageError for `latest`."""
        aliases.protect(self._home, name, alias, is_protected)

    def protected(self, name: str) -> set[str]:
        """The aliases of `name` that are protected."""
        with self._home.reading() as connection:
            return index.protected_aliases(connection, check_name(name))

    # Labels, search, lineage, events

    def set_labels(self, version: Version, wanted: Mapping[str, str | None]) -> None:
        """Notes key=value of the version; a value of None takes a label away. Raises NameInvalid, AdapterNotFound."""
        labels.set_labels(self._home, version, wanted)

    def labels(self, version: Version) -> dict[str, str]:
        with self._home.reading() as connection:
            return index.labels_of(connection, version)

    def search(self, wanted: Search, *, limit: int | None = None) -> list[Version]:
        """Versions that fit all that is wanted, in the order of names and numbers."""
        with self._home.reading() as connection:
            return listing.search(connection, wanted, limit)

    def allow_mismatch(self, version: Version, base_id: str) -> None:
        """Records, for good, that the version is served on the weights of that other base.

        Raises AdapterNotFound (the version was removed), StoreError (nothing can be written here).
        """
        mismatches.allow_mismatch(self._home, version, base_id)

    def mismatches(self, version: Version) -> list[Mismatch]:
        """Other bases that the version was served on."""
        with self._home.reading() as connection:
            return index.mismatches_of(connection, version)

    def lineage(self, version: Version) -> Ancestor:
        """The version with all that it was made of, as far as the registry knows."""
        return lineage(self._home, version)

    def events(self, cursor: int = 0) -> Iterator[Event]:
        """What happened after `cursor`, which each event carries: additions, alias moves, removals, labels."""
        return self._home.journal.follow(cursor)

    def lease(self) -> Lease:
        """A lease of this process: what it keeps, no gc takes. Raises StoreError."""
        from flora.registry.leases import Lease

        return Lease(self.root)

    def leased(self, version_digest: str) -> Version | None:
        """The version of that digest, though it was removed, while a process of this machine holds a lease of it."""
        from flora.registry.leases import leased_version

        return leased_version(self.root, self._home.store, version_digest)

    def remove(self, ref: str | Reference, *, force: bool = False) -> list[Version]:
        """Takes a version (`name@vN`), or with a bare name all of them, out of the index; `gc` frees the bytes.

        An alias other than `latest` protects its version unless `force`. `latest` falls back to the newest one left.
        Raises NameInvalid, UsageError (an alias, or protected by one), AdapterNotFound.
        """
        reference = parse_reference(ref) if isinstance(ref, str) else ref
        return removal.remove(self._home, reference, force=force)

    # Bases

    def register_base(self, record: BaseRecord, *, name: str, path: Path) -> None:
        """Keeps the base's record as a blob, and in the index where it lies on this machine."""
        bases.register_base(self._home, record, name=name, path=path)

    def bases(self) -> list[BaseEntry]:
        with self._home.reading() as connection:
            return listing.base_entries(connection)

    def base_record(self, base_id: str) -> BaseRecord | None:
        """The record of that base, if it was registered here. Raises NameInvalid, StoreError."""
        return bases.base_record(self._home, base_id)

    def is_base_proven(self, version: Version) -> bool:
        """Whether the version's base was registered here, and by its own record has a place for all of the version.

        Raises StoreError.
        """
        return bases.is_base_proven(self._home, version)

    # Care

    def gc(self, *, dry_run: bool = False, grace_s: float = 3600.0) -> GcReport:
        """Takes blobs that nothing refers to and leftovers of crashed writes, once they are older than `grace_s`."""
        from flora.registry import care

        return care.gc(self._home, dry_run=dry_run, grace_s=grace_s)

    def fsck(self) -> list[Problem]:
        """Every problem of index and store; changes nothing. Reads all weights."""
        from flora.registry import care

        return care.fsck(self._home)

    def reindex(self) -> RebuildReport:
        """Makes the index anew from the journal and the manifests, all or nothing."""
        from flora.registry import care

        return care.reindex(self._home)
