"""Changes of the index, each one step inside a write transaction that its caller holds.

What a bulk import does a hundred thousand times takes many rows at once, as statements that are built once: to build
one takes SQLAlchemy longer than SQLite takes to run it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import bindparam, select

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
    weights_tensors,
)

_NAME_ID = select(names.c.id).where(names.c.name == bindparam("of_name")).scalar_subquery()
_VERSION_ID = (
    select(versions.c.id)
    .where(versions.c.name_id == _NAME_ID, versions.c.digest == bindparam("of_digest"))
    .scalar_subquery()
)
_RESERVE = sa.text(  # of one name the largest number counts; both databases know this upsert
    "INSERT INTO names (name, next_number) VALUES (:name, :next_number) ON CONFLICT (name) DO UPDATE SET next_number ="
    " CASE WHEN excluded.next_number > names.next_number THEN excluded.next_number ELSE names.next_number END"
)
_INSERT_TENSOR = sa.text(
    "INSERT INTO weights_tensors (weights, tensor, size) VALUES (:weights, :tensor, :size) ON CONFLICT DO NOTHING"
)
_INSERT_VERSION = versions.insert().values(name_id=_NAME_ID)
_INSERT_BLOB = version_blobs.insert().values(version_id=_VERSION_ID)
_DELETE_ALIAS = aliases.delete().where(aliases.c.name_id == _NAME_ID, aliases.c.alias == bindparam("of_alias"))
_INSERT_ALIAS = aliases.insert().values(name_id=_NAME_ID, version_id=_VERSION_ID)
_INSERT_MOVE = alias_moves.insert()


def reserve_numbers(connection: sa.Connection, numbers: Iterable[tuple[str, int]]) -> None:
    """Makes the name of each (name, number) known if it is new, and sees to it that the number is not given again."""
    connection.execute(_RESERVE, [{"name": name, "next_number": number + 1} for name, number in numbers])


def insert_versions(
    connection: sa.Connection,
    items: Sequence[tuple[Version, Manifest, Mapping[str, Any]]],
    blake3: Mapping[str, str],
) -> None:
    """Adds (version, manifest, provenance), at least one, with numbers that were free in the same transaction.

    blake3  of those of their blobs of which it is known, by digest
    """
    reserve_numbers(connection, [(version.name, version.number) for version, _, _ in items])
    connection.execute(
        _INSERT_VERSION, [_row(version) | {"provenance": json.dumps(dict(made))} for version, _, made in items]
    )
    blobs: list[dict[str, Any]] = []
    for version, manifest, _ in items:
        sizes = {blob.digest: blob.size for blob in manifest.blobs}  # two extras may be the same bytes
        owner = {"of_name": version.name, "of_digest": version.digest}
        blobs += [owner | {"digest": each, "size": size, "blake3": blake3.get(each)} for each, size in sizes.items()]
    connection.execute(_INSERT_BLOB, blobs)


def note_blake3(connection: sa.Connection, version: Version, digest: str, blake3: str) -> None:
    """Notes the BLAKE3 of the version's blob of that digest; of none, if the version was removed."""
    found = version_blobs.c.version_id == _VERSION_ID, version_blobs.c.digest == bindparam("of_blob")
    update = version_blobs.update().where(*found).values(blake3=blake3)
    connection.execute(update, _owner(version) | {"of_blob": digest})


def note_tensors(connection: sa.Connection, known: Mapping[str, Mapping[str, int]]) -> None:
    """Notes which large tensors each weights file has: sizes by their digest, by the digest of the file."""
    rows = [
        {"weights": weights, "tensor": tensor, "size": size}
        for weights, tensors in known.items()
        for tensor, size in tensors.items()
    ]
    if rows:
        connection.execute(_INSERT_TENSOR, rows)


def forget_tensors(connection: sa.Connection) -> None:
    """Forgets the tensors of weights files that no version has."""
    kept = select(version_blobs.c.digest)
    connection.execute(weights_tensors.delete().where(weights_tensors.c.weights.not_in(kept)))


def _row(version: Version) -> dict[str, Any]:
    return {
        "of_name": version.name,
        "number": version.number,
        "digest": version.digest,
        "serving_digest": version.serving_digest,
        "created_at": version.created_at.isoformat(),
        "base_id": version.base_id,
        "base_name": version.base_name,
        "max_rank": version.max_rank,
        "num_modules": version.num_modules,
        "num_bytes": version.num_bytes,
        "kept_share": version.kept_share,
        "operation": version.operation,
        "parents": json.dumps(version.parents),
    }


def delete_version(connection: sa.Connection, version: Version) -> None:
    """Takes the version's rows out; no alias may point to it any more."""
    connection.execute(versions.delete().where(versions.c.id == _VERSION_ID), _owner(version))


def move_aliases(connection: sa.Connection, moves: Sequence[tuple[AliasMove, str | None]]) -> None:
    """Points each alias to the version of the digest beside its move, or for None takes it away; and writes history.

    At least one move. They happen in their order: of several of one alias the last one holds.
    """
    ends = {(move.name, move.alias): target for move, target in moves}
    connection.execute(_DELETE_ALIAS, [{"of_name": name, "of_alias": alias} for name, alias in ends])
    pointed = [
        {"of_name": name, "alias": alias, "of_digest": target} for (name, alias), target in ends.items() if target
    ]
    if pointed:
        connection.execute(_INSERT_ALIAS, pointed)
    connection.execute(_INSERT_MOVE, [_history(move) for move, _ in moves])


def _history(move: AliasMove) -> dict[str, Any]:
    return {
        "name": move.name,
        "alias": move.alias,
        "digest": move.digest,
        "previous": move.previous,
        "actor": move.actor,
        "reason": move.reason,
        "moved_at": move.moved_at.isoformat(),
    }


def set_label(connection: sa.Connection, version: Version, key: str, value: str | None) -> None:
    """Gives the version that label, or for None takes it away."""
    found = labels.c.version_id == _VERSION_ID, labels.c.key == bindparam("of_key")
    connection.execute(labels.delete().where(*found), _owner(version) | {"of_key": key})
    if value is not None:
        row = _owner(version) | {"key": key, "value": value}
        connection.execute(labels.insert().values(version_id=_VERSION_ID), row)


def set_protection(connection: sa.Connection, name: str, alias: str, is_protected: bool) -> None:
    """Protects the alias of that name, or no longer does."""
    connection.execute(protections.delete().where(protections.c.name == name, protections.c.alias == alias))
    if is_protected:
        connection.execute(protections.insert().values(name=name, alias=alias))


def put_mismatch(connection: sa.Connection, version: Version, mismatch: Mismatch) -> None:
    """Notes that the version was served on that other base."""
    row = {"base_id": mismatch.base_id, "actor": mismatch.actor, "allowed_at": mismatch.allowed_at.isoformat()}
    connection.execute(mismatches.insert().values(version_id=_VERSION_ID), _owner(version) | row)


def put_base(connection: sa.Connection, base_id: str, name: str, path: Path) -> None:
    """Registers the base, or corrects its name and where it lies."""
    connection.execute(bases.delete().where(bases.c.base_id == base_id))
    connection.execute(bases.insert().values(base_id=base_id, name=name, path=str(path)))


def clear(connection: sa.Connection) -> None:
    """Empties every table but the bases, whose places on this machine stand nowhere else."""
    for table in (
        aliases,
        alias_moves,
        labels,
        mismatches,
        protections,
        version_blobs,
        versions,
        names,
        weights_tensors,
    ):
        connection.execute(table.delete())


def _owner(version: Version) -> dict[str, Any]:
    return {"of_name": version.name, "of_digest": version.digest}
