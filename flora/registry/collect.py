"""Garbage collection: mark what rows need, take the rest once it is old. When unsure, keep."""

import time
from collections.abc import Collection

import sqlalchemy as sa

from flora.registry import index
from flora.registry.records import GcReport
from flora.registry.store import BlobStore, store_error


def collect(
    connection: sa.Connection, store: BlobStore, *, dry_run: bool, grace_s: float, leased: Collection[str] = ()
) -> GcReport:
    """Takes unreferenced blobs and leftovers older than `grace_s`. The caller holds the index's write lock.

    A writer stores its blobs before it takes the lock to name them: the grace time is theirs. `leased` blobs stay.
    """
    used = index.blobs_in_use(connection)
    limit = time.time() - grace_s
    removed: list[str] = []
    num_bytes = kept_young = kept_leased = 0
    for blob in store.files():
        if str(blob.digest) in used:
            continue
        if str(blob.digest) in leased:
            kept_leased += 1
            continue
        if blob.modified_at > limit:
            kept_young += 1
            continue
        try:
            if not dry_run:
                store.delete(blob.digest)
        except OSError as error:
            raise store_error(f"blob {blob.digest} cannot be deleted", error) from error
        removed.append(str(blob.digest))
        num_bytes += blob.size
    for leftover in store.leftovers(older_than_s=grace_s, take=not dry_run):
        removed.append(leftover.name)
        num_bytes += leftover.size
    return GcReport(tuple(removed), num_bytes, kept_young, dry_run, kept_leased)
