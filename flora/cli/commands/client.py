"""`flora run`, `ps`, `load` and `unload`: against a running server."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from flora.cli.options import AsJson, IdsOnly, Ref, complete_reference
from flora.cli.output import Column, Format, choose_format, print_json, print_record, print_table
from flora.cli.remote import DEFAULT_URL, Card, Resident, Server
from flora.cli.sizes import show_bytes

_Url = Annotated[
    str, typer.Option("--server", metavar="URL", envvar="FLORA_SERVER_URL", help="Where the server answers.")
]
_Key = Annotated[
    str | None, typer.Option("--api-key", metavar="KEY", envvar="FLORA_API_KEY", help="If the server asks for one.")
]


def run(
    model: Annotated[
        str,
        typer.Argument(
            metavar="REF",
            help="An adapter (NAME, NAME:ALIAS, NAME@vN), or the base's name; `flora ps --all` lists them.",
            autocompletion=complete_reference,
        ),
    ],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from; - reads it from stdin.")],
    chat: Annotated[bool, typer.Option("--chat", help="Ask as a chat message, through the model's template.")] = False,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", min=1, help="Longest answer, in tokens.")
    ] = 256,
    temperature: Annotated[float, typer.Option("--temperature", metavar="T", min=0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Equal seeds draw equal answers.")] = None,
    url: _Url = DEFAULT_URL,
    api_key: _Key = None,
    as_json: AsJson = False,
) -> None:
    """Send one prompt to a running server and print the answer as it comes.

    [bold]Examples[/bold]

      flora run sql "List the customers of"

      echo "Who are you?" | flora run sql:prod - --chat
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    if seed is not None:
        options["seed"] = seed
    answer, finish_reason, usage = "", None, None
    with Server(url, api_key) as server:
        if chat:
            pieces = server.chat(model, [{"role": "user", "content": text}], **options)
        else:
            pieces = server.complete(model, text, **options)
        for piece in pieces:
            answer += piece.text
            finish_reason, usage = piece.finish_reason or finish_reason, piece.usage or usage
            if not as_json:
                print(piece.text, end="", flush=True)
    if as_json:
        print_json({"model": model, "text": answer, "finish_reason": finish_reason, "usage": usage})
    else:
        print()


def ps(
    show_all: Annotated[bool, typer.Option("--all", "-a", help="Adapters that are not loaded, too.")] = False,
    url: _Url = DEFAULT_URL,
    api_key: _Key = None,
    as_json: AsJson = False,
    quiet: IdsOnly = False,
) -> None:
    """List what a running server holds in memory: the base, and the adapters that are loaded.

    One that no name means by itself, an older version or one that was removed, stands there with its digest, which
    `flora unload` takes.

    [bold]Example[/bold]

      flora ps --all
    """
    form = choose_format(as_json=as_json, ids_only=quiet)
    with Server(url, api_key) as server:
        cards, resident = list(server.models()), server.resident()
    listed = {(card.get("flora") or {}).get("serving_digest") for card in cards}
    rows = [_model_row(card) for card in cards]
    rows += [_resident_row(adapter) for adapter in resident if adapter["serving_digest"] not in listed]
    columns = (
        Column("model", "model", keeps_whole=True),
        Column("version", "version", lambda version: version or "base"),
        Column("rank", "rank", lambda rank: str(rank or "-"), is_number=True),
        Column("num_bytes", "size", lambda size: show_bytes(size) if size else "-", is_number=True),
        Column("place", "where"),
    )
    shown = [row for row in rows if show_all or row["place"] != "disk"]
    print_table(form, "models", columns, shown, id_key="model")


def load(
    ref: Ref,
    pin: Annotated[bool, typer.Option("--pin", help="Never evict it.")] = False,
    url: _Url = DEFAULT_URL,
    api_key: _Key = None,
    as_json: AsJson = False,
    quiet: IdsOnly = False,
) -> None:
    """Load an adapter into a running server now, before its first request.

    [bold]Example[/bold]

      flora load sql@v3
    """
    form = choose_format(as_json=as_json, ids_only=quiet)
    with Server(url, api_key) as server:
        answer = server.load(ref, is_pinned=pin)
    record = {"ref": answer["flora"]["ref"], "serving_digest": answer["flora"]["serving_digest"],
              "load_ms": answer["load_ms"]}  # fmt: skip
    _print_change(form, record, [("loaded in", f"{answer['load_ms']:.1f} ms")])


def unload(
    ref: Annotated[
        str,
        typer.Argument(
            metavar="REF",
            help="NAME, NAME:ALIAS or NAME@vN; or the sha256:… that `flora ps` shows.",
            autocompletion=complete_reference,
        ),
    ],
    url: _Url = DEFAULT_URL,
    api_key: _Key = None,
    as_json: AsJson = False,
    quiet: IdsOnly = False,
) -> None:
    """Give an adapter's memory back. The next request for it loads it again.

    [bold]Example[/bold]

      flora unload sql
    """
    form = choose_format(as_json=as_json, ids_only=quiet)
    with Server(url, api_key) as server:
        answer = server.unload(ref)
    record = {"ref": answer["flora"]["ref"], "was_loaded": answer["was_resident"]}
    _print_change(form, record, [("unloaded", "yes" if answer["was_resident"] else "it was not loaded")])


def _print_change(form: Format, record: dict[str, Any], facts: list[tuple[str, str]]) -> None:
    print_record(form, record, id_key="ref", facts=facts, title=record["ref"])


def _model_row(card: Card) -> dict[str, Any]:
    details = card.get("flora") or {}
    is_base = card.get("parent") is None
    return {
        "model": card["id"],
        "version": None if is_base else card.get("root"),
        "rank": details.get("rank"),
        "num_bytes": details.get("bytes"),
        "place": "memory" if is_base else details.get("residency", "disk"),
    }


def _resident_row(adapter: Resident) -> dict[str, Any]:
    return {
        "model": adapter["label"],
        "version": adapter["serving_digest"],
        "rank": adapter["rank"],
        "num_bytes": adapter["bytes"],
        "place": adapter["residency"],
    }
