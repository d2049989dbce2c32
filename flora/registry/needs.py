"""What the index needs of the store: blobs that its rows name, and tensors that several weights files have."""

from collections.abc import Collection

import sqlalchemy as sa
from sqlalchemy import select

from flora.registry.tables import bases, version_blobs, versions, weights_tensors


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
