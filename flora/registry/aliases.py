"""Aliases: moved by compare-and-set, with a history."""

from datetime import UTC, datetime

import sqlalchemy as sa

from flora.errors import AliasConflict, UsageError
from flora.names import Digest, Reference, check_alias, check_name
from flora.registry import changes, index
from flora.registry.home import Home
from flora.registry.journal import Moved, Protected
from flora.registry.place import current_user
from flora.registry.records import UNSET, AliasMove, Unset, Version
from flora.registry.refusals import not_found


def set_alias(
    home: Home,
    name: str,
    alias: str,
    version: Version,
    expected: str | Unset | None,
    reason: str,
    *,
    force: bool = False,
) -> None:
    """Points `alias` to `version`, if it still points to the version digest `expected` (None: does not exist yet).

    force  also if the alias is protected
    """
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
        point(home, connection, name, alias, version.digest, reason, force=force)


def point(
    home: Home,
    connection: sa.Connection,
    name: str,
    alias: str,
    digest: str | None,
    reason: str,
    *,
    force: bool = False,
) -> None:
    """Moves the alias to the version of that digest, or for None takes it away; nothing if it is there already.

    Raises UsageError if the alias is protected, unless `force`.
    """
    current = index.find(connection, Reference(name, alias=alias))
    previous = current.digest if current else None
    if previous == digest:
        return
    if not force and alias in index.protected_aliases(connection, name):
        raise UsageError(
            f"{name}:{alias} is protected, and stays at {current.ref if current else 'nothing'}",
            fix="repeat it with --force and a --reason, or lift it: flora registry unprotect",
            alias=alias,
        )
    move = AliasMove(name, alias, digest, previous, current_user(), reason, datetime.now(UTC))
    changes.move_alias(connection, move, target=digest)
    moved_at = move.moved_at.isoformat()
    home.journal.note(connection, [Moved(name, alias, digest, previous, move.actor, reason, moved_at)])


def protect(home: Home, name: str, alias: str, is_protected: bool) -> None:
    """Protects the alias of that name from being moved without force, or no longer does; it need not exist yet.

    Raises NameInvalid, UsageError (`latest` moves by itself), AdapterNotFound.
    """
    check_name(name)
    check_alias(alias)
    if alias == "latest":
        raise UsageError("latest moves with each new version and cannot be protected", fix="protect prod, or another")
    with home.writing() as connection:
        if not index.versions_of(connection, name):
            raise not_found(connection, Reference(name))
        if (alias in index.protected_aliases(connection, name)) != is_protected:
            changes.set_protection(connection, name, alias, is_protected)
            home.journal.note(connection, [Protected(name, alias, is_protected)])
