"""What the index lists: names by the page, versions that fit a search, bases; and names that look like another one."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import func, select

from flora.registry.records import BaseEntry, Entry, Search, Version
from flora.registry.rows import DEFAULT_ALIASES, NAMED, POINTED, VERSION, version_of
from flora.registry.tables import aliases, bases, labels, names, versions

_MAX_NEAR = 1000  # names looked at for a suggestion: a misspelt request must stay cheap


def entries(connection: sa.Connection, prefix: str, limit: int | None, after: str) -> list[Entry]:
    """One entry per name that has versions, in the order of names: two queries, however many names there are.

    after  only names behind this one: a page costs the same wherever it begins
    """
    page = _listed(prefix, after).limit(limit).subquery("page")

    def pointed(alias: str) -> sa.ScalarSelect[Any]:
        query = select(aliases.c.version_id).where(aliases.c.name_id == page.c.id, aliases.c.alias == alias)
        return query.correlate(page).scalar_subquery()

    def of_versions(what: Callable[..., sa.ColumnElement[int]]) -> sa.ScalarSelect[Any]:
        counted = versions.alias("counted")
        return select(what(counted.c.id)).where(counted.c.name_id == page.c.id).correlate(page).scalar_subquery()

    chosen = func.coalesce(*(pointed(alias) for alias in DEFAULT_ALIASES), of_versions(func.max))
    rows = connection.execute(
        select(of_versions(func.count), page.c.name, *VERSION[1:])
        .select_from(page.join(versions, versions.c.id == chosen))
        .order_by(page.c.name)
    ).all()
    pointers: dict[str, dict[str, int]] = {}
    query = select(names.c.name, aliases.c.alias, versions.c.number).select_from(POINTED)
    query = query.where(names.c.id.in_(select(page.c.id))).order_by(aliases.c.alias)
    for name, alias, number in connection.execute(query):
        pointers.setdefault(name, {})[alias] = number
    return [Entry(row[1], version_of(row[1:]), pointers.get(row[1], {}), row[0]) for row in rows]


def search(connection: sa.Connection, wanted: Search, limit: int | None) -> list[Version]:
    """Versions that fit all that is wanted, in the order of names and numbers."""
    query = select(*VERSION).select_from(NAMED)
    if wanted.text:
        escaped = wanted.text.lower().replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        pattern = f"%{escaped}%"
        labeled = select(labels.c.version_id).where(
            sa.or_(
                func.lower(labels.c.key).like(pattern, escape="\\"),
                func.lower(labels.c.value).like(pattern, escape="\\"),
            )
        )
        query = query.where(
            sa.or_(
                func.lower(names.c.name).like(pattern, escape="\\"),
                func.lower(versions.c.base_name).like(pattern, escape="\\"),
                versions.c.id.in_(labeled),
            )
        )
    for key, value in wanted.labels.items():
        has = select(labels.c.version_id).where(labels.c.key == key)
        query = query.where(versions.c.id.in_(has if value is None else has.where(labels.c.value == value)))
    if wanted.base is not None:
        query = query.where(sa.or_(versions.c.base_name == wanted.base, versions.c.base_id == wanted.base))
    if wanted.min_energy is not None:
        query = query.where(versions.c.kept_share >= wanted.min_energy)
    if wanted.max_rank is not None:
        query = query.where(versions.c.max_rank <= wanted.max_rank)
    if wanted.operation is not None:
        query = query.where(versions.c.operation == wanted.operation)
    query = query.order_by(names.c.name, versions.c.number).limit(limit)
    return [version_of(row) for row in connection.execute(query)]


def near_names(connection: sa.Connection, name: str) -> list[str]:
    """Up to three names that look like `name`, of those that start with the same letter."""
    candidates = connection.execute(_listed(name[:1]).limit(_MAX_NEAR)).all()
    return difflib.get_close_matches(name, [row.name for row in candidates], n=3)


def base_entries(connection: sa.Connection) -> list[BaseEntry]:
    """Registered bases, and those that only adapters name, in the order of names."""
    query = select(versions.c.base_id, func.min(versions.c.base_name), func.count())
    query = query.where(versions.c.base_id.is_not(None)).group_by(versions.c.base_id)
    named = {row[0]: BaseEntry(row[0], row[1], None, row[2]) for row in connection.execute(query)}
    registered = {
        base_id: BaseEntry(
            base_id=base_id,
            name=name,
            path=Path(path) if path else None,
            num_adapters=named[base_id].num_adapters if base_id in named else 0,
        )
        for base_id, name, path in connection.execute(select(bases.c.base_id, bases.c.name, bases.c.path))
    }
    return sorted((named | registered).values(), key=lambda entry: (entry.name, entry.base_id))


def _listed(prefix: str, after: str = "") -> sa.Select[Any]:
    """Ids and names, in order, of the names behind `after` with versions that start with `prefix`."""
    # one lower bound: of two, SQLite seeks to the first and reads its way from there to the other
    begin = names.c.name > after if after >= prefix else names.c.name >= prefix
    in_range = sa.and_(begin, names.c.name < prefix + "\x7f")  # names are ASCII
    query = select(names.c.id, names.c.name).where(in_range, sa.exists().where(versions.c.name_id == names.c.id))
    return query.order_by(names.c.name)
