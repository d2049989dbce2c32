"""`flora tag`, `promote` and `rollback`: which version a name means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flora.cli.options import AsJson, IdsOnly, RegistryUrl, open_registry
from flora.cli.output import Format, choose_format, print_record
from flora.errors import NotFound
from flora.names import check_alias, check_name

if TYPE_CHECKING:
    from flora.registry import Registry, Version

_Reason = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Kept in the alias's history.")]
PRODUCTION = "prod"


def tag(
    ref: Annotated[str, typer.Argument(metavar="REF", help="The version to point to.")],
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="prod, canary, …")],
    reason: _Reason = "",
    registry: RegistryUrl = None,
    as_json: AsJson = False,
    quiet: IdsOnly = False,
) -> None:
    """Point an alias to a version. A running server follows it from the next request on.

    [bold]Example[/bold]

      flora tag sql@v3 canary
    """
    _move(ref, alias, reason, registry, choose_format(as_json=as_json, ids_only=quiet))


def promote(
    ref: Annotated[str, typer.Argument(metavar="REF", help="The version to promote.")],
    reason: _Reason = "",
    registry: RegistryUrl = None,
    as_json: AsJson = False,
    quiet: IdsOnly = False,
) -> None:
    """Make a version what its bare name means: point the alias prod to it.

    [bold]Example[/bold]

      flora promote sql:canary --reason "0.2 points better on the test side"
    """
    _move(ref, PRODUCTION, reason, registry, choose_format(as_json=as_json, ids_only=quiet))


def rollback(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    alias: Annotated[str, typer.Option("--alias", metavar="ALIAS")] = PRODUCTION,
    reason: _Reason = "rollback",
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
                fix=f"`flora show {name}` lists the versions; point it with `flora tag NAME@vN {alias}`",
            )
        target = store.resolve(f"{name}@{moves[-1].previous}")
        _point(store, target, alias, reason, form)


def _move(ref: str, alias: str, reason: str, registry_url: str | None, form: Format) -> None:
    check_alias(alias)
    with open_registry(registry_url) as store:
        _point(store, store.resolve(ref), alias, reason, form)


def _point(store: Registry, target: Version, alias: str, reason: str, form: Format) -> None:
    """Moves the alias unless someone else does so at the same moment, and says from where to where."""
    current = store.aliases(target.name).get(alias)
    store.set_alias(target.name, alias, target, expected=current.digest if current else None, reason=reason)
    record = {
        "id": f"{target.name}:{alias}",
        "ref": target.ref,
        "digest": target.digest,
        "previous": current.ref if current else None,
    }
    facts = [("now", target.ref), ("before", current.ref if current else "nothing")]
    print_record(form, record, id_key="id", facts=facts, title=record["id"] or "")
