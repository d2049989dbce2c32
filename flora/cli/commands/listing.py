"""`flora ls` and `flora show`: what the registry holds."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flora.cli.options import AsJson, IdsOnly, Ref, RegistryUrl, open_registry
from flora.cli.output import Column, Format, choose_format, note, percent, print_record, print_table
from flora.cli.sizes import show_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flora.registry import Entry, Version
    from flora.registry.lineage import Ancestor


def ls(
    prefix: Annotated[str, typer.Argument(metavar="PREFIX", help="Only names that begin like this.")] = "",
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="At most N names.")] = None,
    registry: RegistryUrl = None,
    as_json: AsJson = False,
    quiet: IdsOnly = False,
) -> None:
    """List the adapters, one line per name.

    [bold]Examples[/bold]

      flora ls

      flora ls team/ --json
    """
    form = choose_format(as_json=as_json, ids_only=quiet)
    with open_registry(registry, create=registry is None) as store:
        entries = store.names(prefix=prefix, limit=limit)
    columns = (
        Column("name", "name", keeps_whole=True),
        Column("version", "version", lambda number: f"v{number}"),
        Column("aliases", "aliases", lambda aliases: ", ".join(sorted(aliases))),
        Column("rank", "rank", is_number=True),
        Column("num_bytes", "size", show_bytes, is_number=True),
        Column("kept_share", "kept", percent, is_number=True),
        Column("base", "base"),
        Column("created_at", "made", _day),
    )
    print_table(form, "adapters", columns, [_entry_row(entry) for entry in entries], id_key="name")
    if form is Format.HUMAN and not entries and not prefix:
        note("next: flora extract BASE TUNED")


def show(
    ref: Ref,
    lineage: Annotated[
        bool, typer.Option("--lineage", help="What it was made of instead: base, tuned checkpoint, earlier versions.")
    ] = False,
    registry: RegistryUrl = None,
    as_json: AsJson = False,
    quiet: IdsOnly = False,
) -> None:
    """Show one version: its identities, its base, what it keeps, where it comes from; and all versions of its name.

    [bold]Examples[/bold]

      flora show sql

      flora show sql:prod --json

      flora show sql --lineage
    """
    form = choose_format(as_json=as_json, ids_only=quiet)
    with open_registry(registry) as store:
        version = store.resolve(ref)
        if lineage:
            _print_lineage(form, store.lineage(version))
            return
        labels, protected = store.labels(version), store.protected(version.name)
        mismatches = store.mismatches(version)
        versions = store.versions(version.name)
        aliases = {alias: target.number for alias, target in store.aliases(version.name).items()}
        header, report = store.header(version), store.report(version)
        provenance, shared_bytes = store.provenance(version), store.shared_bytes(version)
    from flora.adapter import to_json

    record = {
        **version_row(version),
        "shared_bytes": shared_bytes,
        "kept_share_of_modules": report.extracted_share if report else None,
        "tuned": header.recipe.tuned_name,
        "recipe": to_json(header.recipe),
        "extras": sorted(header.extras),
        "aliases": aliases,
        "protected": sorted(protected),
        "labels": labels,
        "mismatches": [
            {"base_id": each.base_id, "actor": each.actor, "allowed_at": each.allowed_at.isoformat()}
            for each in mismatches
        ],
        "versions": [version_row(each) for each in versions],
        "modules": [to_json(module) for module in header.modules],
        "provenance": provenance,
    }
    options = header.recipe.options.items()
    made_by = " ".join(f"{key}={value}" for key, value in options if value not in (None, "", False))
    parents = [each.ref for each in versions if each.digest in version.parents]
    facts = [
        ("digest", version.digest),
        ("serving digest", version.serving_digest),
        ("base", f"{version.base_name} ({version.base_id or 'not known by content'})"),
        ("made by", f"{version.operation} {made_by}" + (f" from {', '.join(parents)}" if parents else "")),
        ("made", version.created_at.strftime("%Y-%m-%d %H:%M UTC")),
        ("modules", f"{version.num_modules}, ranks up to {version.max_rank}"),
        ("size", show_bytes(version.num_bytes) + _sharing(shared_bytes)),
        ("kept energy", f"{percent(record['kept_share_of_modules'])} of the modules' change"),
        ("", f"{percent(version.kept_share)} of the whole change"),
        ("carries", ", ".join(sorted(header.extras)) or "nothing but weights"),
        ("aliases", ", ".join(f"{alias} -> v{number}" for alias, number in sorted(aliases.items())) or "none"),
        ("protected", ", ".join(sorted(protected)) or "none"),
        ("labels", ", ".join(f"{key}={value}" for key, value in labels.items()) or "none"),
        *(
            ("served on", f"another base, {each.base_id}: {each.actor}, {each.allowed_at:%Y-%m-%d}")
            for each in mismatches
        ),
        ("versions", ", ".join(f"v{each.number} ({each.operation})" for each in versions)),
    ]
    print_record(form, record, id_key="ref", facts=facts, title=version.ref)


def _print_lineage(form: Format, line: Ancestor) -> None:
    """A tree for people, one line per step elsewhere."""
    rows = list(_steps(line, 0))
    if form is Format.HUMAN:
        for row in rows:
            what = f"{row['operation'] or 'unknown'} {row['ref'] or row['digest']}"
            print("   " * row["depth"] + ("└─ " if row["depth"] else "") + what)
            if not row["num_parents"] and row["base"]:
                begin = "   " * (row["depth"] + 1) + "└─ "
                print(f"{begin}base {row['base']} ({row['base_id'] or 'not proven'})")
                if row["tuned"]:
                    print(f"{begin}tuned {row['tuned']} ({row['tuned_id'] or 'not hashed'})")
        return
    keys = ("depth", "operation", "ref", "digest", "base", "base_id", "tuned", "tuned_id")
    print_table(form, "lineage", [Column(key, key) for key in keys], rows, id_key="digest")


def _steps(line: Ancestor, depth: int) -> Iterator[dict[str, Any]]:
    yield {
        "depth": depth,
        "operation": line.operation,
        "ref": line.version.ref if line.version else None,
        "digest": line.digest,
        "base": line.base,
        "base_id": line.base_id,
        "tuned": line.tuned,
        "tuned_id": line.tuned_id,
        "num_parents": len(line.parents),
    }
    for parent in line.parents:
        yield from _steps(parent, depth + 1)


def _entry_row(entry: Entry) -> dict[str, Any]:
    version = entry.version
    return {
        "name": entry.name,
        "ref": version.ref,
        "version": version.number,
        "versions": entry.num_versions,
        "aliases": entry.aliases,
        "rank": version.max_rank,
        "num_bytes": version.num_bytes,
        "kept_share": version.kept_share,
        "base": version.base_name,
        "base_id": version.base_id,
        "digest": version.digest,
        "created_at": version.created_at.isoformat(),
    }


def version_row(version: Version) -> dict[str, Any]:
    return {
        "ref": version.ref,
        "name": version.name,
        "version": version.number,
        "digest": version.digest,
        "serving_digest": version.serving_digest,
        "base": version.base_name,
        "base_id": version.base_id,
        "operation": version.operation,
        "parents": list(version.parents),
        "max_rank": version.max_rank,
        "num_modules": version.num_modules,
        "num_bytes": version.num_bytes,
        "kept_share": version.kept_share,
        "created_at": version.created_at.isoformat(),
    }


def _sharing(num_bytes: int) -> str:
    return f", {show_bytes(num_bytes)} of it stored once with others" if num_bytes else ""


def _day(moment: str) -> str:
    return datetime.fromisoformat(moment).strftime("%Y-%m-%d")
