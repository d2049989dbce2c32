"""Questions to the index about one name or version, each asked inside a transaction that its caller holds."""

import json
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import bindparam, func, select

from flora.names import Reference
from flora.registry.records import AliasMove, Mismatch, Version
from flora.registry.rows import DEFAULT_ALIASES, NAMED, POINTED, VERSION, version_of
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
)

# Built once: to build a statement takes SQLAlchemy longer than SQLite takes to answer it.
_NAME = names.c.name == bindparam("name")
_BY_NUMBER = select(*VERSION).select_from(NAMED).where(_NAME, versions.c.number == bindparam("number"))
_BY_DIGEST = select(*VERSION).select_from(NAMED).where(_NAME, versions.c.digest == bindparam("digest"))
_BY_ALIAS = select(*VERSION).select_from(POINTED).where(_NAME, aliases.c.alias == bindparam("alias"))
_BLAKE3 = (
    select(version_blobs.c.blake3)
    .join(versions, versions.c.id == version_blobs.c.version_id)
    .where(versions.c.digest == bindparam("version"), version_blobs.c.digest == bindparam("blob"))
    .where(version_blobs.c.blake3.is_not(None))
    .limit(1)
)


def find(connection: sa.Connection, reference: Reference) -> Version | None:
    """The version that `reference` means, if there is one."""
    name = reference.name
    if reference.version is not None:
        return _first(connection, _BY_NUMBER, name=name, number=reference.version)
    if reference.digest is not None:
        return _first(connection, _BY_DIGEST, name=name, digest=str(reference.digest))
    for alias in (reference.alias,) if reference.alias else DEFAULT_ALIASES:
        if version := _first(connection, _BY_ALIAS, name=name, alias=alias):
            return version
    return None


def find_digest(connection: sa.Connection, digest: str) -> Version | None:
    """The oldest version of that digest, whatever its name."""
    query = select(*VERSION).select_from(NAMED).where(versions.c.digest == digest).order_by(versions.c.id)
    return _first(connection, query.limit(1))


def versions_of(connection: sa.Connection, name: str) -> list[Version]:
    """All versions of `name`, oldest first."""
    query = select(*VERSION).select_from(NAMED).where(names.c.name == name).order_by(versions.c.number)
    return [version_of(row) for row in connection.execute(query)]


def every_version(connection: sa.Connection) -> list[Version]:
    query = select(*VERSION).select_from(NAMED).order_by(names.c.name, versions.c.number)
    return [version_of(row) for row in connection.execute(query)]


def provenance_of(connection: sa.Connection, version: Version) -> dict[str, Any]:
    query = select(versions.c.provenance).select_from(NAMED)
    text = connection.execute(query.where(names.c.name == version.name, versions.c.digest == version.digest)).scalar()
    return json.loads(text) if text else {}


def blake3_of(connection: sa.Connection, version_digest: str, blob: str) -> str | None:
    """The BLAKE3, in hex, of a blob that the version needs; None if it was not noted, or the version was removed."""
    return connection.execute(_BLAKE3, {"version": version_digest, "blob": blob}).scalar()


def aliases_of(connection: sa.Connection, name: str) -> dict[str, Version]:
    query = select(aliases.c.alias, *VERSION).select_from(POINTED).where(names.c.name == name)
    return {row[0]: version_of(row[1:]) for row in connection.execute(query.order_by(aliases.c.alias))}


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
    query = select(labels.c.key, labels.c.value).select_from(NAMED.join(labels, labels.c.version_id == versions.c.id))
    query = query.where(names.c.name == version.name, versions.c.number == version.number).order_by(labels.c.key)
    return {row[0]: row[1] for row in connection.execute(query)}


def is_registered_base(connection: sa.Connection, base_id: str) -> bool:
    """Whether somebody has shown that base's weights here. That adapters name it is no proof of it."""
    return connection.execute(select(bases.c.base_id).where(bases.c.base_id == base_id)).first() is not None


def mismatches_of(connection: sa.Connection, version: Version) -> list[Mismatch]:
    """Other bases that the version was served on, the first first."""
    row = mismatches.c
    query = select(row.base_id, row.actor, row.allowed_at).select_from(
        NAMED.join(mismatches, row.version_id == versions.c.id)
    )
    query = query.where(names.c.name == version.name, versions.c.number == version.number)
    found = connection.execute(query.order_by(row.allowed_at, row.base_id))
    return [Mismatch(base_id, actor, datetime.fromisoformat(allowed_at)) for base_id, actor, allowed_at in found]


def protected_aliases(connection: sa.Connection, name: str) -> set[str]:
    return set(connection.execute(select(protections.c.alias).where(protections.c.name == name)).scalars())


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


def _first(connection: sa.Connection, query: sa.Select[Any], **values: Any) -> Version | None:
    row = connection.execute(query, values).first()
    return version_of(row) if row else None
