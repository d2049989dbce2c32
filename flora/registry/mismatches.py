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

    Raises AdapterNotFound if the version was removed, StoreError if nothing can be written.
    """
    with home.reading() as connection:
        if _is_known(index.mismatches_of(connection, version), base_id):
            return
    reference = Reference(version.name, version=version.number)
    with home.writing() as connection:
        if index.find(connection, reference) != version:
            raise not_found(connection, reference)
        if _is_known(index.mismatches_of(connection, version), base_id):  # by another loader meanwhile
            return
        mismatch = Mismatch(base_id, current_user(), datetime.now(UTC))
        changes.put_mismatch(connection, version, mismatch)
        allowed_at = mismatch.allowed_at.isoformat()
        home.journal.note(connection, [Mismatched(version.name, version.number, base_id, mismatch.actor, allowed_at)])


def _is_known(mismatches: list[Mismatch], base_id: str) -> bool:
    return any(mismatch.base_id == base_id for mismatch in mismatches)
