"""Changes of the index, each one step inside a write transaction that its caller holds."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import select

from flora.registry.manifest import Manifest
from flora.registry.records import AliasMove, Mismatch, Version
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


def reserve_number(connection: sa.Connection, name: str, number: int) -> None:
    """Makes the name known if it is new, and sees to it that `number` is not given again."""
    following = sa.case((names.c.next_number <= number, number + 1), else_=names.c.next_number)
    changed = connection.execute(names.update().where(names.c.name == name).values(next_number=following))
    if not changed.rowcount:
        connection.execute(names.insert().values(name=name, next_number=number + 1))


def insert_version(
    connection: sa.Connection, version: Version, manifest: Manifest, provenance: Mapping[str, Any]
) -> None:
    """Adds `version`, whose number the caller took from `index.next_number` in the same transaction."""
    reserve_number(connection, version.name, version.number)
    row = versions.insert().values(
        name_id=_name_id(version.name),
        number=version.number,
        digest=version.digest,
        serving_digest=version.serving_digest,
        created_at=version.created_at.isoformat(),
        base_id=version.base_id,
        base_name=version.base_name,
        max_rank=version.max_rank,
        num_modules=version.num_modules,
        num_bytes=version.num_bytes,
        kept_share=version.kept_share,
        operation=version.operation,
        parents=json.dumps(version.parents),
        provenance=json.dumps(dict(provenance)),
    )
    version_id = connection.execute(row).inserted_primary_key[0]  # type: ignore[index]
    sizes = {blob.digest: blob.size for blob in manifest.blobs}  # two extras may be the same bytes
    connection.execute(
        version_blobs.insert(),
        [{"version_id": version_id, "digest": digest, "size": size} for digest, size in sizes.items()],
    )


def delete_version(connection: sa.Connection, version: Version) -> None:
    """Takes the version's rows out; no alias may point to it any more."""
    connection.execute(versions.delete().where(versions.c.id == _version_id(version.name, version.digest)))


def move_alias(connection: sa.Connection, move: AliasMove, *, target: str | None) -> None:
    """Points the alias to the version of digest `target`, or for None takes it away; and writes `move` as history."""
    name_id = _name_id(move.name)
    connection.execute(aliases.delete().where(aliases.c.name_id == name_id, aliases.c.alias == move.alias))
    if target is not None:
        version_id = _version_id(move.name, target)
        connection.execute(aliases.insert().values(name_id=name_id, alias=move.alias, version_id=version_id))
    connection.execute(
        alias_moves.insert().values(
            name=move.name,
            alias=move.alias,
            digest=move.digest,
            previous=move.previous,
            actor=move.actor,
            reason=move.reason,
            moved_at=move.moved_at.isoformat(),
        )
    )


def set_label(connection: sa.Connection, version: Version, key: str, value: str | None) -> None:
    """Gives the version that label, or for None takes it away."""
    version_id = _version_id(version.name, version.digest)
    connection.execute(labels.delete().where(labels.c.version_id == version_id, labels.c.key == key))
    if value is not None:
        connection.execute(labels.insert().values(version_id=version_id, key=key, value=value))


def set_protection(connection: sa.Connection, name: str, alias: str, is_protected: bool) -> None:
    """Protects the alias of that name, or no longer does."""
    connection.execute(protections.delete().where(protections.c.name == name, protections.c.alias == alias))
    if is_protected:
        connection.execute(protections.insert().values(name=name, alias=alias))


def put_mismatch(connection: sa.Connection, version: Version, mismatch: Mismatch) -> None:
    """Notes that the version was served on that other base."""
    connection.execute(
        mismatches.insert().values(
            version_id=_version_id(version.name, version.digest),
            base_id=mismatch.base_id,
            actor=mismatch.actor,
            allowed_at=mismatch.allowed_at.isoformat(),
        )
    )


def put_base(connection: sa.Connection, base_id: str, name: str, path: Path) -> None:
    """Registers the base, or corrects its name and where it lies."""
    connection.execute(bases.delete().where(bases.c.base_id == base_id))
    connection.execute(bases.insert().values(base_id=base_id, name=name, path=str(path)))


def clear(connection: sa.Connection) -> None:
    """Empties every table but the bases, whose places on this machine stand nowhere else."""
    for table in (aliases, alias_moves, labels, mismatches, protections, version_blobs, versions, names):
        connection.execute(table.delete())


def _name_id(name: str) -> sa.ScalarSelect[Any]:
    return select(names.c.id).where(names.c.name == name).scalar_subquery()


def _version_id(name: str, digest: str) -> sa.ScalarSelect[Any]:
    query = select(versions.c.id).where(versions.c.name_id == _name_id(name), versions.c.digest == digest)
    return query.scalar_subquery()
