"""Flags that several verbs share, each spelled and explained once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flora.cli.sizes import parse_bytes

if TYPE_CHECKING:
    from flora.rank import RankRule
    from flora.registry import Registry

_RANK_PANEL = "How much to keep"
_MAX_COMPLETIONS = 200


def complete_reference(context: typer.Context, incomplete: str) -> list[str]:
    """Names that start like what was typed; behind a `:` that name's aliases, behind an `@` its versions.

    Of a list with commas the last one is completed.
    """
    from flora.errors import FloraError

    before, comma, last = incomplete.rpartition(",")
    if comma:
        return [f"{before},{found}" for found in complete_reference(context, last)]
    try:
        with open_registry(context.params.get("registry")) as store:
            for mark in (":", "@"):
                name, found, start = incomplete.partition(mark)
                if found:
                    ends = store.aliases(name) if mark == ":" else [f"v{each.number}" for each in store.versions(name)]
                    return [f"{name}{mark}{end}" for end in ends if end.startswith(start)]
            return [entry.name for entry in store.names(prefix=incomplete, limit=_MAX_COMPLETIONS)]
    except FloraError:  # no registry, no such name: a shell wants no words about it
        return []


Ref = Annotated[
    str,
    typer.Argument(metavar="REF", help="NAME, NAME:ALIAS or NAME@vN.", autocompletion=complete_reference),
]
RefOrFolder = Annotated[
    str,
    typer.Argument(
        metavar="REF", help="NAME, NAME:ALIAS or NAME@vN; or a folder: ./adapter.", autocompletion=complete_reference
    ),
]
Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="A name of the registry, without version or alias.", autocompletion=complete_reference
    ),
]
RegistryUrl = Annotated[
    str | None,
    typer.Option(
        "--registry",
        metavar="URL",
        help="Registry folder, sqlite:///FILE or postgresql://HOST/DB?blobs=FOLDER, instead of the default.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, with a schema_version.")]
IdsOnly = Annotated[bool, typer.Option("--quiet", "-q", help="Only ids on stdout, and no notes.")]
MaxRank = Annotated[
    int | None, typer.Option("--rank", metavar="N", help="At most N terms per module.", rich_help_panel=_RANK_PANEL)
]
Energy = Annotated[
    float | None,
    typer.Option(
        "--energy",
        metavar="SHARE",
        help="The fewest terms that keep this share of each module's squared norm, such as 0.95.",
        rich_help_panel=_RANK_PANEL,
    ),
]
MovedAlias = Annotated[
    str | None, typer.Option("--alias", metavar="ALIAS", help="Let this alias point to the new version.")
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="SIZE",
        help="The terms that keep most in so many bytes, all modules together: 100MB.",
        rich_help_panel=_RANK_PANEL,
    ),
]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="cpu, or cuda.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")]


def rank_rule(rank: int | None, energy: float | None, budget: str | None) -> RankRule:
    """The rule that the three flags make together; empty if none was given."""
    from flora.rank import RankRule

    return RankRule(rank, energy, parse_bytes(budget) if budget is not None else None)


def open_registry(url: str | None, *, create: bool = False) -> Registry:
    from flora.registry import Registry

    return Registry.open(url, create=create)
