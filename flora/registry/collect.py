"""Garbage collection: mark what rows need, take the rest once it is old. When unsure, keep."""

import time
from collections.abc import Collection
from dataclasses import dataclass, field

import sqlalchemy as sa

from flora.registry import changes, needs
from flora.registry.disk import store_error
from flora.registry.records import GcReport
from flora.registry.store import BlobFile, BlobStore


@dataclass(slots=True)
class _Marks:
    """What must stay beside what rows and leases name."""

    parts: set[str] = field(default_factory=set)  # of blobs that lie in parts
    is_unsure: bool = False  # a list of parts that is needed cannot be read: any blob may be one of them
    twice: dict[str, bool] = field(default_factory=dict)  # blobs in both forms: whether the parts are sound


def collect(
    connection: sa.Connection,
    store: BlobStore,
    *,
    dry_run: bool,
    grace_s: float,
    leased: Collection[str] = (),
    num_shared_bytes: int = 0,
) -> GcReport:
    """Takes unreferenced blobs and leftovers older than `grace_s`. The caller holds the index's write lock.

    A writer stores its blobs before it takes the lock to name them: the grace time is theirs. `leased` blobs stay.
    Of a blob that is there whole and in parts, as a crash may leave it, the parts stay if they are sound.
    """
    used = needs.blobs_in_use(connection)
    limit = time.time() - grace_s
    marks = _mark(store, used.union(leased), limit)
    removed: list[str] = []
    num_bytes = kept_young = kept_leased = 0
    for blob in store.files():
        digest = str(blob.digest)
        if not _is_superfluous(blob, marks):
            if digest in used or digest in marks.parts:
                continue
            if digest in leased:
                kept_leased += 1
                continue
            if blob.modified_at > limit or marks.is_unsure:
                kept_young += 1
                continue
        try:
            if not dry_run:
                store.delete(blob.digest, is_list=blob.is_list)
        except OSError as error:
            raise store_error(f"blob {blob.digest} cannot be deleted", error) from error
        removed.append(digest)
        num_bytes += blob.size
    for leftover in store.leftovers(older_than_s=grace_s, take=not dry_run):
        removed.append(leftover.name)
        num_bytes += leftover.size
    if not dry_run:
        changes.forget_tensors(connection)
    return GcReport(tuple(removed), num_bytes, kept_young, dry_run, kept_leased, num_shared_bytes)


def _mark(store: BlobStore, live: Collection[str], limit: float) -> _Marks:
    """Follows the lists of parts that are needed, and the young ones, whose writers may be about to name them."""
    marks = _Marks()
    for file in store.lists():
        digest = str(file.digest)
        if digest in live and store.is_whole(file.digest):
            marks.twice[digest] = store.is_sound(file.digest, in_parts=True)
            if not marks.twice[digest]:
                continue
        if digest in live or file.modified_at > limit:
            parts = store.parts(file.digest) or ()
            marks.parts |= {part.digest for part in parts}
            marks.is_unsure |= not parts
    return marks


def _is_superfluous(blob: BlobFile, marks: _Marks) -> bool:
    """Whether this is the form of a blob that another form makes needless."""
    sound_parts = marks.twice.get(str(blob.digest))
    return sound_parts is not None and blob.is_list != sound_parts
