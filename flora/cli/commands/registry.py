"""`flora registry`: the registry itself: protected aliases, events, the index, and whether it keeps its promises."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flora.cli.options import AsJson, IdsOnly, Name, RegistryUrl, open_registry
from flora.cli.output import Column, choose_format, note, print_record, print_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from flora.registry.journal import Event

app = typer.Typer(no_args_is_help=True)

_Alias = Annotated[str, typer.Argument(metavar="ALIAS", help="prod, canary, …")]


def protect(
    name: Name, alias: _Alias, registry: RegistryUrl = None, as_json: AsJson = False, quiet: IdsOnly = False
) -> None:
    """Keep an alias where it is: from now on it moves only with --force.

    [bold]Example[/bold]

      flora registry protect sql prod
    """
    _protect(name, alias, True, registry, as_json, quiet)


def unprotect(
    name: Name, alias: _Alias, registry: RegistryUrl = None, as_json: AsJson = False, quiet: IdsOnly = False
) -> None:
    """Let a protected alias move again.

    [bold]Example[/bold]

      flora registry unprotect sql prod
    """
    _protect(name, alias, False, registry, as_json, quiet)


def _protect(name: str, alias: str, is_protected: bool, registry: str | None, as_json: bool, quiet: bool) -> None:
    form = choose_format(as_json=as_json, ids_only=quiet)
    with open_registry(registry) as store:
        store.protect(name, alias, is_protected=is_protected)
    title = f"{name}:{alias}"
    record = {"id": title, "protected": is_protected}
    print_record(form, record, id_key="id", facts=[("protected", "yes" if is_protected else "no")], title=title)


def events(
    after: Annotated[int, typer.Option("--after", metavar="CURSOR", min=0, help="Only what came after.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more, until Ctrl-C.")] = False,
    registry: RegistryUrl = None,
    as_json: AsJson = False,
    quiet: IdsOnly = False,
) -> None:
    """What happened: versions added and removed, aliases moved, labels noted. Each line has a cursor to go on from.

    [bold]Examples[/bold]

      flora registry events --json

      flora registry events --follow --after 4211
    """
    form = choose_format(as_json=as_json, ids_only=quiet)
    columns = [Column(key, key) for key in ("cursor", "op", "name", "what")]
    with open_registry(registry) as store:
        rows = [_event_row(event) for event in store.events(after)]
        print_table(form, "events", columns, rows, id_key="cursor")
        while follow:
            after = rows[-1]["cursor"] if rows else after
            time.sleep(0.5)
            rows = [_event_row(event) for event in store.events(after)]
            if rows:
                print_table(form, "events", columns, rows, id_key="cursor")


def _event_row(event: Event) -> dict[str, Any]:
    import msgspec

    change: dict[str, Any] = msgspec.to_builtins(event.change)
    told = {
        "add": lambda: f"v{change['number']} {change['digest']}",
        "remove": lambda: f"v{change['number']}",
        "alias": lambda: f":{change['alias']} -> {change['digest'] or 'nothing'}",
        "label": lambda: f"v{change['number']} {change['key']}={change['value'] or ''}",
        "mismatch": lambda: f"v{change['number']} served on {change['base_id']}",
        "protect": lambda: f":{change['alias']} {'protected' if change['is_protected'] else 'free'}",
    }[change["op"]]()
    return {"cursor": event.cursor, "what": told, **change}


def reindex(registry: RegistryUrl = None, as_json: AsJson = False, quiet: IdsOnly = False) -> None:
    """Make the index anew from the journal and the manifests, all or nothing.

    [bold]Example[/bold]

      flora registry reindex
    """
    form = choose_format(as_json=as_json, ids_only=quiet)
    with open_registry(registry) as store:
        report = store.reindex()
    record = {"num_versions": report.num_versions, "skipped": list(report.skipped)}
    facts = [("versions", str(report.num_versions)), ("skipped", ", ".join(report.skipped) or "none")]
    print_record(form, record, id_key="num_versions", facts=facts)
    for ref in report.skipped:
        note(f"note: {ref} was left out: its manifest is missing or damaged")


def conformance(
    url: Annotated[
        str | None, typer.Argument(metavar="[URL]", help="Folder, sqlite:///FILE or postgresql://…; default: yours.")
    ] = None,
    as_json: AsJson = False,
    quiet: IdsOnly = False,
) -> None:
    """Whether a registry keeps what it promises: one suite for every backend. Exit 3 if a promise is not kept.

    It works under a name of its own and removes what it made.

    [bold]Example[/bold]

      flora registry conformance postgresql://host/flora?blobs=/shared/flora
    """
    from flora.errors import CheckFailed
    from flora.registry.conformance import run

    form = choose_format(as_json=as_json, ids_only=quiet)
    results = list(run(url))
    rows = [{"promise": each.promise, "kept": each.failure is None, "failure": each.failure} for each in results]
    columns = (
        Column("promise", "promise"),
        Column("kept", "kept", lambda kept: "yes" if kept else "NO"),
        Column("failure", "failure", lambda failure: failure or ""),
    )
    print_table(form, "promises", columns, rows, id_key="promise")
    if broken := [each for each in results if each.failure is not None]:
        raise CheckFailed(
            f"{len(broken)} of {len(results)} promises are not kept",
            cause=broken[0].failure,
            fix="keep no adapters there until they are; the backend's own log may say why",
        )


VERBS: dict[str, Callable[..., None]] = {
    "protect": protect,
    "unprotect": unprotect,
    "events": events,
    "reindex": reindex,
    "conformance": conformance,
}
