"""`flora label` and `search`: what people note of versions, and finding them by it."""

from __future__ import annotations

from typing import Annotated

import typer

from flora.cli.commands.listing import version_row
from flora.cli.options import AsJson, IdsOnly, Ref, RegistryUrl, open_registry
from flora.cli.output import Column, choose_format, percent, print_record, print_table
from flora.cli.sizes import show_bytes
from flora.errors import UsageError


def label(
    ref: Ref,
    labels: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Labels to note; KEY= takes one away.")
    ] = None,
    registry: RegistryUrl = None,
    as_json: AsJson = False,
    quiet: IdsOnly = False,
) -> None:
    """Note key=value of a version, to find it by. Labels are no part of its identity.

    [bold]Examples[/bold]

      flora label sql@v3 team=data task=text-to-sql

      flora label sql@v3 task=
    """
    form = choose_format(as_json=as_json, ids_only=quiet)
    for each in labels or ():
        if "=" not in each:
            raise UsageError(f"{each!r} is no label", fix=f"give {each}=VALUE to note one, {each}= to take it away")
    wanted = {key: value or None for key, _, value in (each.partition("=") for each in labels or ())}
    with open_registry(registry) as store:
        version = store.resolve(ref)
        if wanted:
            store.set_labels(version, wanted)
        have = store.labels(version)
    record = {"ref": version.ref, "digest": version.digest, "labels": have}
    print_record(form, record, id_key="ref", facts=list(have.items()) or [("labels", "none")], title=version.ref)


def search(
    text: Annotated[
        str, typer.Argument(metavar="[TEXT]", help="Part of a name, of the base's name or of a label.")
    ] = "",
    labels: Annotated[
        list[str] | None, typer.Option("--label", metavar="KEY[=VALUE]", help="Has this label, or this value of it.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="BASE", help="Belongs to this base: name or id.")
    ] = None,
    min_energy: Annotated[
        float | None, typer.Option("--min-energy", metavar="SHARE", help="Keeps at least this of the whole change.")
    ] = None,
    max_rank: Annotated[int | None, typer.Option("--max-rank", metavar="N", help="No rank above this.")] = None,
    operation: Annotated[
        str | None, typer.Option("--made-by", metavar="OPERATION", help="extract, prune, import or merge.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="At most N versions.")] = None,
    registry: RegistryUrl = None,
    as_json: AsJson = False,
    quiet: IdsOnly = False,
) -> None:
    """Find versions that fit all that is given.

    [bold]Examples[/bold]

      flora search sql

      flora search --label team=data --min-energy 0.9 --max-rank 64
    """
    from flora.registry import Search

    form = choose_format(as_json=as_json, ids_only=quiet)
    wanted = Search(
        text=text,
        labels={key: value if found else None for key, found, value in (each.partition("=") for each in labels or ())},
        base=base,
        min_energy=min_energy,
        max_rank=max_rank,
        operation=operation,
    )
    with open_registry(registry) as store:
        versions = store.search(wanted, limit=limit)
        noted = [store.labels(version) for version in versions]
    rows = [version_row(version) | {"labels": have} for version, have in zip(versions, noted, strict=True)]
    columns = (
        Column("ref", "version", keeps_whole=True),
        Column("operation", "made by"),
        Column("max_rank", "rank", is_number=True),
        Column("num_bytes", "size", show_bytes, is_number=True),
        Column("kept_share", "kept", percent, is_number=True),
        Column("base", "base"),
        Column("labels", "labels", lambda have: ", ".join(f"{key}={value}" for key, value in have.items())),
    )
    print_table(form, "versions", columns, rows, id_key="ref")
