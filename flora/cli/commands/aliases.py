"""`flora tag`, `promote` and `rollback`: which version a name means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flora.cli.options import AsJson, DryRun, IdsOnly, Name, Ref, RegistryUrl, open_registry
from flora.cli.output import Format, choose_format, note, print_record
from flora.errors import CheckFailed, NotFound
from flora.names import check_alias, check_name

if TYPE_CHECKING:
    from flora.registry import Registry, Version

_Reason = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Kept in the alias's history.")]
_Force = Annotated[bool, typer.Option("--force", help="Also if the alias is protected.")]
PRODUCTION = "prod"


def tag(
    ref: Ref,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="prod, canary, …")],
    reason: _Reason = "",
    force: _Force = False,
    registry: RegistryUrl = None,
    as_json: AsJson = False,
    quiet: IdsOnly = False,
) -> None:
    """Point an alias to a version. A running server follows it from the next request on.

    [bold]Example[/bold]

      flora tag sql@v3 canary
    """
    form = choose_format(as_json=as_json, ids_only=quiet)
    check_alias(alias)
    with open_registry(registry) as store:
        _point(store, store.resolve(ref), alias, reason, form, force=force)


def promote(
    ref: Ref,
    require: Annotated[
        list[str] | None,
        typer.Option(
            "--require",
            metavar="BOUND",
            help="Only if it holds: energy>=0.9 (of the whole change), module_energy, rank, bytes, base=proven.",
        ),
    ] = None,
    to: Annotated[str, typer.Option("--to", metavar="ALIAS", help="The alias to point.")] = PRODUCTION,
    reason: _Reason = "",
    force: _Force = False,
    dry_run: DryRun = False,
    registry: RegistryUrl = None,
    as_json: AsJson = False,
    quiet: IdsOnly = False,
) -> None:
    """Make a version what its bare name means: point the alias prod to it. Exit 3 if a requirement does not hold.

    What was required is kept in the alias's history.

    [bold]Examples[/bold]

      flora promote sql:canary --reason "0.2 points better on the test side"

      flora promote sql:canary --require "energy>=0.9" --require base=proven
    """
    from flora.registry.requirements import parse_requirement, unmet

    form = choose_format(as_json=as_json, ids_only=quiet)
    check_alias(to)
    required = [parse_requirement(text) for text in require or ()]
    with open_registry(registry) as store:
        version = store.resolve(ref)
        report = store.report(version)
        proven = any(each.what == "base" for each in required) and store.is_base_proven(version)
        whys = [unmet(each, version, report, is_base_proven=proven) for each in required]
        failed = [why for why in whys if why is not None]
        if failed:
            raise CheckFailed(
                f"{version.ref} is not promoted to {to}: it does not meet {failed[0]}",
                cause="; ".join(failed[1:]) or None,
                fix="extract or prune it again with another rank or energy, or require less",
            )
        kept = " ".join(filter(None, [reason, *(f"[{each}]" for each in required)]))
        _point(store, version, to, kept, form, force=force, dry_run=dry_run)


def rollback(
    name: Name,
    alias: Annotated[str, typer.Option("--alias", metavar="ALIAS", help="The alias to point back.")] = PRODUCTION,
    reason: _Reason = "rollback",
    force: _Force = False,
    registry: RegistryUrl = None,
    as_json: AsJson = False,
    quiet: IdsOnly = False,
) -> None:
    """Point an alias back to where it pointed before its last move.

    [bold]Example[/bold]

      flora rollback sql
    """
    form = choose_format(as_json=as_json, ids_only=quiet)
    check_name(name)
    check_alias(alias)
    with open_registry(registry) as store:
        store.versions(name)  # a name that is not here is told as such
        moves = store.history(name, alias)
        if not moves or moves[-1].previous is None:
            raise NotFound(
                f"{name}:{alias} has nothing to go back to",
                cause="it never moved from one version to another",
                fix=f"`flora show {name}` lists the versions; point it with `flora tag {name}@vN {alias}`",
            )
        target = store.resolve(f"{name}@{moves[-1].previous}")
        _point(store, target, alias, reason, form, force=force)


def _point(
    store: Registry,
    target: Version,
    alias: str,
    reason: str,
    form: Format,
    *,
    force: bool,
    dry_run: bool = False,
) -> None:
    """Moves the alias unless someone else does so at the same moment, and says from where to where."""
    current = store.aliases(target.name).get(alias)
    if not dry_run:
        expected = current.digest if current else None
        store.set_alias(target.name, alias, target, expected=expected, reason=reason, force=force)
    record = {
        "id": f"{target.name}:{alias}",
        "ref": target.ref,
        "digest": target.digest,
        "previous": current.ref if current else None,
        "dry_run": dry_run,
    }
    facts = [("now", target.ref), ("before", current.ref if current else "nothing")]
    print_record(form, record, id_key="id", facts=facts, title=f"{target.name}:{alias}")
    if dry_run and form is not Format.IDS:
        note("note: nothing was moved; this is what it would be")
