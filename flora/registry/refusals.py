"""What the registry says when a name does not lead to an adapter, or leads to another base."""

from collections.abc import Iterable

import sqlalchemy as sa

from flora.adapter import BaseBinding
from flora.errors import AdapterNotFound, UsageError
from flora.names import Reference
from flora.registry import index, listing


def not_found(connection: sa.Connection, reference: Reference) -> AdapterNotFound:
    """The error that says how near `reference` came, and what to do; `near` lists names that look alike."""
    name = reference.name
    known = index.versions_of(connection, name)
    if not known:
        near = listing.near_names(connection, name)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        return AdapterNotFound(
            f"no adapter is named {name}",
            fix=f"{hint}`flora ls` lists what is here; `flora extract` and `flora import` add to it",
            near=near,
        )
    last = known[-1]
    if reference == Reference(name):
        return AdapterNotFound(
            f"{name} has neither an alias prod nor an alias latest, so its bare name means no version",
            fix=f"name a version, such as {last.ref}, or point an alias to one: `flora tag {last.ref} latest`",
            near=[],
        )
    aliases = ", ".join(index.aliases_of(connection, name)) or "none"
    return AdapterNotFound(
        f"there is no {reference}",
        fix=f"{name} goes up to v{last.number}, its aliases are: {aliases}; `flora show {name}` lists them",
        near=[],
    )


def check_binding(name: str, bases: Iterable[tuple[str | None, str]], base: BaseBinding) -> None:
    """Raises UsageError if `name`, whose versions belong to `bases` (id, name), would get one of another base."""
    for base_id, base_name in bases:
        both_known = base_id is not None and base.base_id is not None
        if (base_id != base.base_id) if both_known else (base_name != base.name):
            raise UsageError(
                f"the name {name} belongs to another base: {_describe(base_name, base_id)}",
                cause=f"this adapter is for {_describe(base.name, base.base_id)}",
                fix="give the adapter another name with --name",
                base_id=base_id,
            )


def _describe(name: str, base_id: str | None) -> str:
    return f"{name} (base id {base_id[:19]}…)" if base_id else f"{name} (weights never shown to Flora)"
