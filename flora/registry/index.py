"""Questions to the index, each asked inside a transaction that its caller holds."""

import difflib
import json
from collections.abc import Callable, Collection
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import bindparam, func, select

from flora.names import Reference
from flora.registry.records import AliasMove, BaseEntry, Entry, Mismatch, Search, Version
from flora.registry.tables import (
    alias_moves,
    aliases,
    bases,
    labels,
    mismatches,
    names,
    protections,
    version_blobs,
    versions,
    weights_tensors,
)

_DEFAULT_ALIASES = ("prod", "latest")  # what a bare name means, first hit
_MAX_NEAR = 1000  # names looked at for a suggestion: a misspelt request must stay cheap
_VERSION = (
    names.c.name, versions.c.number, versions.c.digest, versions.c.serving_digest, versions.c.created_at,
    versions.c.base_id, versions.c.base_name, versions.c.max_rank, versions.c.num_modules, versions.c.num_bytes,
    versions.c.kept_share, versions.c.operation, versions.c.parents,
)  # fmt: skip
_CREATED_AT = [column.name for column in _VERSION].index("created_at")
_PARENTS = msgspec.json.Decoder(tuple[str, ...])
_NAMED = versions.join(names, names.c.id == versions.c.name_id)
_POINTED = _NAMED.join(aliases, aliases.c.version_id == versions.c.id)

# Built once: to build a statement takes SQLAlchemy longer than SQLite takes to answer it.
_NAME = names.c.name == bindparam("name")
_BY_NUMBER = select(*_VERSION).select_from(_NAMED).where(_NAME, versions.c.number == bindparam("number"))
_BY_DIGEST = select(*_VERSION).select_from(_NAMED).where(_NAME, versions.c.digest == bindparam("digest"))
_BY_ALIAS = select(*_VERSION).select_from(_POINTED).where(_NAME, aliases.c.alias == bindparam("alias"))


_NAMES = names.c.name.in_(bindparam("names", expanding=True))
_KNOWN = (
    select(*_VERSION).select_from(_NAMED).where(_NAMES, versions.c.digest.in_(bindparam("digests", expanding=True)))
)
_NEXT = select(names.c.name, names.c.next_number).where(_NAMES)
_BASES = select(names.c.name, versions.c.base_id, versions.c.base_name).select_from(_NAMED).where(_NAMES).distinct()
_ENDS = (
    select(names.c.name, versions.c.digest, versions.c.number)
    .select_from(_POINTED)
    .where(_NAMES, aliases.c.alias == bindparam("alias"))
)
_PROTECTED = select(protections.c.name).where(
    protections.c.name.in_(bindparam("names", expanding=True)), protections.c.alias == bindparam("alias")
)


def find(connection: sa.Connection, reference: Reference) -> Version | None:
    """The version that `reference` means, if there is one."""
    name = reference.name
    if reference.version is not None:
        return _first(connection, _BY_NUMBER, name=name, number=reference.version)
    if reference.digest is not None:
        return _first(connection, _BY_DIGEST, name=name, digest=str(reference.digest))
    for alias in (reference.alias,) if reference.alias else _DEFAULT_ALIASES:
        if version := _first(connection, _BY_ALIAS, name=name, alias=alias):
            return version
    return None


def find_digest(connection: sa.Connection, digest: str) -> Version | None:
    """The oldest version of that digest, whatever its name."""
    query = select(*_VERSION).select_from(_NAMED).where(versions.c.digest == digest).order_by(versions.c.id)
    return _first(connection, query.limit(1))


def versions_of(connection: sa.Connection, name: str) -> list[Version]:
    """All versions of `name`, oldest first."""
    query = select(*_VERSION).select_from(_NAMED).where(names.c.name == name).order_by(versions.c.number)
    return [_version(row) for row in connection.execute(query)]


def every_version(connection: sa.Connection) -> list[Version]:
    query = select(*_VERSION).select_from(_NAMED).order_by(names.c.name, versions.c.number)
    return [_version(row) for row in connection.execute(query)]


def provenance_of(connection: sa.Connection, version: Version) -> dict[str, Any]:
    query = select(versions.c.provenance).select_from(_NAMED)
    text = connection.execute(query.where(names.c.name == version.name, versions.c.digest == version.digest)).scalar()
    return json.loads(text) if text else {}


def aliases_of(connection: sa.Connection, name: str) -> dict[str, Version]:
    query = select(aliases.c.alias, *_VERSION).select_from(_POINTED).where(names.c.name == name)
    return {row[0]: _version(row[1:]) for row in connection.execute(query.order_by(aliases.c.alias))}


def history_of(connection: sa.Connection, name: str, alias: str) -> list[AliasMove]:
    """Every move of the alias, oldest first."""
    moves = alias_moves.c
    query = (
        select(moves.name, moves.alias, moves.digest, moves.previous, moves.actor, moves.reason, moves.moved_at)
        .where(moves.name == name, moves.alias == alias)
        .order_by(moves.id)
    )
    return [AliasMove(*row[:6], moved_at=datetime.fromisoformat(row[6])) for row in connection.execute(query)]


def labels_of(connection: sa.Connection, version: Version) -> dict[str, str]:
    query = select(labels.c.key, labels.c.value).select_from(_NAMED.join(labels, labels.c.version_id == versions.c.id))
    query = query.where(names.c.name == version.name, versions.c.number == version.number).order_by(labels.c.key)
    return {row[0]: row[1] for row in connection.execute(query)}


def mismatches_of(connection: sa.Connection, version: Version) -> list[Mismatch]:
    """Other bases that the version was served on, the first first."""
    row = mismatches.c
    query = select(row.base_id, row.actor, row.allowed_at).select_from(
        _NAMED.join(mismatches, row.version_id == versions.c.id)
    )
    query = query.where(names.c.name == version.name, versions.c.number == version.number)
    found = connection.execute(query.order_by(row.allowed_at, row.base_id))
    return [Mismatch(base_id, actor, datetime.fromisoformat(allowed_at)) for base_id, actor, allowed_at in found]


def protected_aliases(connection: sa.Connection, name: str) -> set[str]:
    return set(connection.execute(select(protections.c.alias).where(protections.c.name == name)).scalars())


def search(connection: sa.Connection, wanted: Search, limit: int | None) -> list[Version]:
    """Versions that fit all that is wanted, in the order of names and numbers."""
    query = select(*_VERSION).select_from(_NAMED)
    if wanted.text:
        escaped = wanted.text.lower().replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        pattern = f"%{escaped}%"
        labeled = select(labels.c.version_id).where(
            sa.or_(
                func.lower(labels.c.key).like(pattern, escape="\\"),
                func.lower(labels.c.value).like(pattern, escape="\\"),
            )
        )
        query = query.where(
            sa.or_(
                func.lower(names.c.name).like(pattern, escape="\\"),
                func.lower(versions.c.base_name).like(pattern, escape="\\"),
                versions.c.id.in_(labeled),
            )
        )
    for key, value in wanted.labels.items():
        has = select(labels.c.version_id).where(labels.c.key == key)
        query = query.where(versions.c.id.in_(has if value is None else has.where(labels.c.value == value)))
    if wanted.base is not None:
        query = query.where(sa.or_(versions.c.base_name == wanted.base, versions.c.base_id == wanted.base))
    if wanted.min_energy is not None:
        query = query.where(versions.c.kept_share >= wanted.min_energy)
    if wanted.max_rank is not None:
        query = query.where(versions.c.max_rank <= wanted.max_rank)
    if wanted.operation is not None:
        query = query.where(versions.c.operation == wanted.operation)
    query = query.order_by(names.c.name, versions.c.number).limit(limit)
    return [_version(row) for row in connection.execute(query)]


def entries(connection: sa.Connection, prefix: str, limit: int | None, after: str) -> list[Entry]:
    """One entry per name that has versions, in the order of names: two queries, however many names there are.

    after  only names behind this one: a page costs the same wherever it begins
    """
    page = _listed(prefix, after).limit(limit).subquery("page")

    def pointed(alias: str) -> sa.ScalarSelect[Any]:
        query = select(aliases.c.version_id).where(aliases.c.name_id == page.c.id, aliases.c.alias == alias)
        return query.correlate(page).scalar_subquery()

    def of_versions(what: Callable[..., sa.ColumnElement[int]]) -> sa.ScalarSelect[Any]:
        counted = versions.alias("counted")
        return select(what(counted.c.id)).where(counted.c.name_id == page.c.id).correlate(page).scalar_subquery()

    chosen = func.coalesce(*(pointed(alias) for alias in _DEFAULT_ALIASES), of_versions(func.max))
    rows = connection.execute(
        select(of_versions(func.count), page.c.name, *_VERSION[1:])
        .select_from(page.join(versions, versions.c.id == chosen))
        .order_by(page.c.name)
    ).all()
    pointers: dict[str, dict[str, int]] = {}
    query = select(names.c.name, aliases.c.alias, versions.c.number).select_from(_POINTED)
    query = query.where(names.c.id.in_(select(page.c.id))).order_by(aliases.c.alias)
    for name, alias, number in connection.execute(query):
        pointers.setdefault(name, {})[alias] = number
    return [Entry(row[1], _version(row[1:]), pointers.get(row[1], {}), row[0]) for row in rows]


def near_names(connection: sa.Connection, name: str) -> list[str]:
    """Up to three names that look like `name`, of those that start with the same letter."""
    candidates = connection.execute(_listed(name[:1]).limit(_MAX_NEAR)).all()
    return difflib.get_close_matches(name, [row.name for row in candidates], n=3)


def known_versions(connection: sa.Connection, wanted: Collection[tuple[str, str]]) -> dict[tuple[str, str], Version]:
    """Those of the (name, digest) that are there."""
    asked = {"names": sorted({name for name, _ in wanted}), "digests": sorted({digest for _, digest in wanted})}
    found = [_version(row) for row in connection.execute(_KNOWN, asked)]
    return {(version.name, version.digest): version for version in found if (version.name, version.digest) in wanted}


def next_numbers(connection: sa.Connection, wanted: Collection[str]) -> dict[str, int]:
    """The number that the next version gets, of each of the names that is known; of others it is 1."""
    return {row.name: row.next_number for row in connection.execute(_NEXT, {"names": sorted(wanted)})}


def bases_of(connection: sa.Connection, wanted: Collection[str]) -> dict[str, list[tuple[str | None, str]]]:
    """(base id, base name) of the versions of each name, each once."""
    found: dict[str, list[tuple[str | None, str]]] = {}
    for name, base_id, base_name in connection.execute(_BASES, {"names": sorted(wanted)}):
        found.setdefault(name, []).append((base_id, base_name))
    return found


def alias_ends(connection: sa.Connection, alias: str, wanted: Collection[str]) -> dict[str, tuple[str, int]]:
    """(digest, number) of the version that the alias of each name points to, where it is there."""
    rows = connection.execute(_ENDS, {"names": sorted(wanted), "alias": alias})
    return {name: (digest, number) for name, digest, number in rows}


def names_that_protect(connection: sa.Connection, alias: str, wanted: Collection[str]) -> set[str]:
    """Those of the names whose alias is protected."""
    return set(connection.execute(_PROTECTED, {"names": sorted(wanted), "alias": alias}).scalars())


def base_entries(connection: sa.Connection) -> list[BaseEntry]:
    """Registered bases, and those that only adapters name, in the order of names."""
    query = select(versions.c.base_id, func.min(versions.c.base_name), func.count())
    query = query.where(versions.c.base_id.is_not(None)).group_by(versions.c.base_id)
    named = {row[0]: BaseEntry(row[0], row[1], None, row[2]) for row in connection.execute(query)}
    registered = {
        base_id: BaseEntry(
            base_id=base_id,
            name=name,
            path=Path(path) if path else None,
            num_adapters=named[base_id].num_adapters if base_id in named else 0,
        )
        for base_id, name, path in connection.execute(select(bases.c.base_id, bases.c.name, bases.c.path))
    }
    return sorted((named | registered).values(), key=lambda entry: (entry.name, entry.base_id))


def blobs_required(connection: sa.Connection) -> set[str]:
    """Digests of the blobs without which a row is void: manifests, what they name, records of registered bases."""
    columns = (versions.c.digest, version_blobs.c.digest, bases.c.base_id)
    return {row[0] for column in columns for row in connection.execute(select(column).distinct())}


def blobs_in_use(connection: sa.Connection) -> set[str]:
    """What gc keeps: the required blobs, and records of bases that only adapters name."""
    named = select(versions.c.base_id).where(versions.c.base_id.is_not(None)).distinct()
    return blobs_required(connection) | {row[0] for row in connection.execute(named)}


def common_tensors(connection: sa.Connection, weights: Collection[str] | None = None) -> list[tuple[str, str, int]]:
    """(weights file, tensor, size) of the large tensors that other files have too; of `weights` alone, or None: all."""
    ours, other = weights_tensors.alias("ours"), weights_tensors.alias("other")
    elsewhere = sa.exists().where(other.c.tensor == ours.c.tensor, other.c.weights != ours.c.weights)
    query = select(ours.c.weights, ours.c.tensor, ours.c.size).where(elsewhere)
    if weights is not None:
        query = query.where(ours.c.weights.in_(weights))
    return [(row[0], row[1], row[2]) for row in connection.execute(query)]


def holders(connection: sa.Connection, tensors: Collection[str]) -> list[tuple[str, str]]:
    """(weights file, tensor) of every file that has one of these tensors."""
    query = select(weights_tensors.c.weights, weights_tensors.c.tensor).where(weights_tensors.c.tensor.in_(tensors))
    return [(row[0], row[1]) for row in connection.execute(query)]


def dangling_aliases(connection: sa.Connection) -> list[tuple[str, str]]:
    """(name, alias) of rows that point to no version of their own name, which no transaction of ours leaves."""
    query = (
        select(func.coalesce(names.c.name, "?"), aliases.c.alias)
        .select_from(
            aliases.outerjoin(names, names.c.id == aliases.c.name_id).outerjoin(
                versions, sa.and_(versions.c.id == aliases.c.version_id, versions.c.name_id == aliases.c.name_id)
            )
        )
        .where(versions.c.id.is_(None))
    )
    return [(row[0], row[1]) for row in connection.execute(query)]


def _listed(prefix: str, after: str = "") -> sa.Select[Any]:
    """Ids and names, in order, of the names behind `after` with versions that start with `prefix`."""
    # one lower bound: of two, SQLite seeks to the first and reads its way from there to the other
    begin = names.c.name > after if after >= prefix else names.c.name >= prefix
    in_range = sa.and_(begin, names.c.name < prefix + "\x7f")  # names are ASCII
    query = select(names.c.id, names.c.name).where(in_range, sa.exists().where(versions.c.name_id == names.c.id))
    return query.order_by(names.c.name)


def _first(connection: sa.Connection, query: sa.Select[Any], **values: Any) -> Version | None:
    row = connection.execute(query, values).first()
    return _version(row) if row else None


def _version(row: Any) -> Version:
    """The version of a row with the columns of `_VERSION`, by position: a listing may have 10,000 of them."""
    values = list(row)
    values[_CREATED_AT] = datetime.fromisoformat(values[_CREATED_AT])
    values[-1] = _PARENTS.decode(values[-1])
    return Version(*values)
