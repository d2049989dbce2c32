"""Questions to the index about many names at once, as a bulk import asks them; each one statement, built once.

To build a statement takes SQLAlchemy longer than SQLite takes to answer it.
"""

from collections.abc import Collection

import sqlalchemy as sa
from sqlalchemy import bindparam, select

from flora.registry.records import Version
from flora.registry.rows import NAMED, POINTED, VERSION, version_of
from flora.registry.tables import aliases, names, protections, versions

_NAMES = names.c.name.in_(bindparam("names", expanding=True))
_KNOWN = select(*VERSION).select_from(NAMED).where(_NAMES, versions.c.digest.in_(bindparam("digests", expanding=True)))
_NEXT = select(names.c.name, names.c.next_number).where(_NAMES)
_BASES = select(names.c.name, versions.c.base_id, versions.c.base_name).select_from(NAMED).where(_NAMES).distinct()
_ENDS = (
    select(names.c.name, versions.c.digest, versions.c.number)
    .select_from(POINTED)
    .where(_NAMES, aliases.c.alias == bindparam("alias"))
)
_PROTECTED = select(protections.c.name).where(
    protections.c.name.in_(bindparam("names", expanding=True)), protections.c.alias == bindparam("alias")
)


def known_versions(connection: sa.Connection, wanted: Collection[tuple[str, str]]) -> dict[tuple[str, str], Version]:
    """Those of the (name, digest) that are there."""
    asked = {"names": sorted({name for name, _ in wanted}), "digests": sorted({digest for _, digest in wanted})}
    found = [version_of(row) for row in connection.execute(_KNOWN, asked)]
    return {(version.name, version.digest): version for version in found if (version.name, version.digest) in wanted}


def next_numbers(connection: sa.Connection, wanted: Collection[str]) -> dict[str, int]:
    """The number that the next version gets, of each of the names that is known; of others it is 1."""
    return {row.name: row.next_number for row in connection.execute(_NEXT, {"names": sorted(wanted)})}


def bases_of(connection: sa.Connection, wanted: Collection[str]) -> dict[str, list[tuple[str | None, str]]]:
    """(base id, base name) of the versions of each name, each once."""
    found: dict[str, list[tuple[str | None, str]]] = {}
    for name, base_id, base_name in connection.execute(_BASES, {"names": sorted(wanted)}):
        found.setdefault(name, []).append((base_id, base_name))
    return found


def alias_ends(connection: sa.Connection, alias: str, wanted: Collection[str]) -> dict[str, tuple[str, int]]:
    """(digest, number) of the version that the alias of each name points to, where it is there."""
    rows = connection.execute(_ENDS, {"names": sorted(wanted), "alias": alias})
    return {name: (digest, number) for name, digest, number in rows}


def names_that_protect(connection: sa.Connection, alias: str, wanted: Collection[str]) -> set[str]:
    """Those of the names whose alias is protected."""
    return set(connection.execute(_PROTECTED, {"names": sorted(wanted), "alias": alias}).scalars())
