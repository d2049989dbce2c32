"""Aliases: moved by compare-and-set, with a history."""

from collections.abc import Sequence
from datetime import UTC, datetime

import sqlalchemy as sa

from flora.errors import AliasConflict, UsageError
from flora.names import Digest, Reference, check_alias, check_name
from flora.registry import changes, index, lookups
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
        point(home, connection, alias, [(name, version.digest, reason)], force=force)


def point(
    home: Home,
    connection: sa.Connection,
    alias: str,
    wanted: Sequence[tuple[str, str | None, str]],
    *,
    force: bool = False,
) -> None:
    """Moves the alias of each (name, digest, reason) to the version of that digest, or for None takes it away.

    What is there already stays. Raises UsageError if one is protected, unless `force`.
    """
    among = {name for name, _, _ in wanted}
    before = lookups.alias_ends(connection, alias, among)
    protected = set() if force else lookups.names_that_protect(connection, alias, among)
    now: dict[str, str | None] = {name: digest for name, (digest, _) in before.items()}
    actor, moved_at = current_user(), datetime.now(UTC)
    moves = []
    for name, digest, reason in wanted:
        previous = now.get(name)
        if previous == digest:
            continue
        if name in protected:
            raise UsageError(
                f"{name}:{alias} is protected, and stays at {f'{name}@v{before[name][1]}' if previous else 'nothing'}",
                fix="repeat it with --force and a --reason, or lift it: flora registry unprotect",
                alias=alias,
            )
        moves.append(AliasMove(name, alias, digest, previous, actor, reason, moved_at))
        now[name] = digest
    if moves:
        changes.move_aliases(connection, [(move, move.digest) for move in moves])
        home.journal.note(connection, [_told(move) for move in moves])


def _told(move: AliasMove) -> Moved:
    return Moved(move.name, move.alias, move.digest, move.previous, move.actor, move.reason, move.moved_at.isoformat())


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
