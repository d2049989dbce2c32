"""Versions served on other weights than their base's: allowed by an operator, and never forgotten."""

from datetime import UTC, datetime

from flora.names import Reference
from flora.registry import changes, index
from flora.registry.home import Home
from flora.registry.journal import Mismatched
from flora.registry.place import current_user
from flora.registry.records import Mismatch, Version
from flora.registry.refusals import not_found


def allow_mismatch(home: Home, version: Version, base_id: str) -> None:
    """Records that the version is served on the base of that id; once for each of the two.

    Of a version that was removed, what stands on record already counts.
    Raises AdapterNotFound if the version was removed and has no record, StoreError if nothing can be written.
    """
    reference = Reference(version.name, version=version.number)
    with home.reading() as connection:
        if _is_known(index.mismatches_of(connection, version), base_id):
            return
        is_removed = index.find(connection, reference) is None
    if is_removed and _was_noted(home, version, base_id):
        return
    with home.writing() as connection:
        if index.find(connection, reference) != version:
            raise not_found(connection, reference)
        if _is_known(index.mismatches_of(connection, version), base_id):  # by another loader meanwhile
            return
        mismatch = Mismatch(base_id, current_user(), datetime.now(UTC))
        changes.put_mismatch(connection, version, mismatch)
        allowed_at = mismatch.allowed_at.isoformat()
        home.journal.note(connection, [Mismatched(version.name, version.number, base_id, mismatch.actor, allowed_at)])


def _was_noted(home: Home, version: Version, base_id: str) -> bool:
    """Whether the journal tells of it: a version's rows go with it, and its number is not given again."""
    noted = (change for change in home.journal.read() if isinstance(change, Mismatched))
    return (version.name, version.number, base_id) in {(each.name, each.number, each.base_id) for each in noted}


def _is_known(mismatches: list[Mismatch], base_id: str) -> bool:
    return any(mismatch.base_id == base_id for mismatch in mismatches)
