"""Aliases: moved by compare-and-set, with a history."""

from datetime import UTC, datetime

import sqlalchemy as sa

from flora.errors import AliasConflict, UsageError
from flora.names import Digest, Reference, check_alias, check_name
from flora.registry import changes, index
from flora.registry.home import Home
from flora.registry.journal import Moved
from flora.registry.place import current_user
from flora.registry.records import UNSET, AliasMove, Unset, Version
from flora.registry.refusals import not_found


def set_alias(home: Home, name: str, alias: str, version: Version, expected: str | Unset | None, reason: str) -> None:
    """Points `alias` to `version`, if it still points to the version digest `expected` (None: does not exist yet)."""
    check_name(name)
    check_alias(alias)
    if version.name != name:
        raise UsageError(f"{version.ref} is no version of {name}", fix=f"give one of `flora show {name}`")
    with home.writing() as connection:
        if index.find(connection, Reference(name, digest=Digest(version.digest))) is None:
            raise not_found(connection, Reference(name, version=version.number))
        current = index.find(connection, Reference(name, alias=alias))
        digest = current.digest if current else None
        if expected is not UNSET and digest != expected:
            raise AliasConflict(
                f"{name}:{alias} is {current.ref if current else 'not there'} by now",
                cause="someone moved it since it was read",
                fix=f"look at `flora show {name}`, then repeat the move if it is still right",
                current=digest,
            )
        point(home, connection, name, alias, version.digest, reason)


def point(home: Home, connection: sa.Connection, name: str, alias: str, digest: str | None, reason: str) -> None:
    """Moves the alias to the version of that digest, or for None takes it away; nothing if it is there already."""
    current = index.find(connection, Reference(name, alias=alias))
    previous = current.digest if current else None
    if previous == digest:
        return
    move = AliasMove(name, alias, digest, previous, current_user(), reason, datetime.now(UTC))
    changes.move_alias(connection, move, target=digest)
    moved_at = move.moved_at.isoformat()
    home.journal.note(connection, [Moved(name, alias, digest, previous, move.actor, reason, moved_at)])
