"""What a command answers: a table for people on a terminal, TSV in a pipe, one JSON object, or bare ids.

Data goes to stdout and everything else to stderr, so `flora ls | cut -f1` sees nothing but data.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from flora.errors import UsageError

_PIPE_WIDTH = 140
SCHEMA_VERSION = 1  # of every JSON object that a command prints


class Format(Enum):
    HUMAN = "human"
    TSV = "tsv"
    JSON = "json"
    IDS = "ids"


@dataclass(frozen=True, slots=True)
class Column:
    key: str  # in JSON and in TSV's first line
    title: str  # for people
    show: Callable[[Any], str] = str  # for people; TSV and JSON have the plain value
    is_number: bool = False
    keeps_whole: bool = False  # on one line, unless that took more than half of the terminal


def choose_format(*, as_json: bool, ids_only: bool) -> Format:
    """What the flags ask for, else a table on a terminal and TSV in a pipe. Raises UsageError for both flags."""
    if as_json and ids_only:
        raise UsageError("--json and --quiet exclude each other", fix="give one of them")
    if as_json:
        return Format.JSON
    if ids_only:
        return Format.IDS
    return Format.HUMAN if sys.stdout.isatty() else Format.TSV


def print_table(
    form: Format, kind: str, columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], *, id_key: str
) -> None:
    """One line per row. In JSON the rows stand whole under `kind`, so they may hold more than the columns show."""
    if form is Format.JSON:
        print_json({kind: list(rows)})
    elif form is Format.IDS:
        for row in rows:
            print(row[id_key])
    elif form is Format.TSV:
        print("\t".join(column.key for column in columns))
        cells = [[_plain(row[column.key]) for row in rows] for column in columns]
        sys.stdout.writelines("\t".join(line) + "\n" for line in zip(*cells, strict=True))
    elif rows:
        _print_rich(columns, rows)
    else:
        note(f"no {kind}")


def print_record(
    form: Format, record: Mapping[str, Any], *, id_key: str, facts: Sequence[tuple[str, str]], title: str = ""
) -> None:
    """One thing: `facts` for people, every plain value of `record` as `key<TAB>value` lines, or all of it as JSON."""
    if form is Format.JSON:
        print_json(record)
    elif form is Format.IDS:
        print(record[id_key])
    elif form is Format.TSV:
        for key, value in record.items():
            if not isinstance(value, (dict, list, tuple)):
                print(f"{key}\t{_plain(value)}")
    else:
        _print_facts(title, facts)


def print_json(value: Mapping[str, Any]) -> None:
    print(json.dumps({"schema_version": SCHEMA_VERSION, **value}, ensure_ascii=False, indent=2, default=str))


def note(text: str = "") -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


def percent(share: float | None) -> str:
    """0.4312 -> `43.1 %`; nothing that was lost ever reads as 100 %, and nothing that is there as 0 %."""
    if share is None:
        return "-"
    text = f"{100 * share:.1f}"
    if text == "0.0" and share > 0:
        return "< 0.1 %"
    return "> 99.9 %" if share < 1 and text == "100.0" else f"{text} %"


def _plain(value: Any) -> str:
    kind = type(value)  # asked first for what nearly all of a long listing is of
    if kind is str and value.isprintable():
        return value
    if kind is int or kind is float:
        return str(value)
    if value is None:
        return ""
    if isinstance(value, dict):
        return ",".join([f"{key}={_plain(entry)}" for key, entry in value.items()])
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return ",".join(map(_plain, value))
    return str(value).replace("\t", " ").replace("\n", " ")


def _print_rich(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)  # a log has none of its own
    cells = [[column.show(row[column.key]) for column in columns] for row in rows]
    for column, shown in zip(columns, zip(*cells, strict=True), strict=True):
        is_whole = column.keeps_whole and 2 * max(map(len, shown)) <= console.width
        table.add_column(
            column.title, justify="right" if column.is_number else "left", no_wrap=is_whole, overflow="fold"
        )
    for line in cells:
        table.add_row(*map(escape, line))
    console.print(table)


def _print_facts(title: str, facts: Sequence[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(escape(name), escape(value))
    console = Console(highlight=False)
    if title:
        console.print(escape(title), style="bold")
    console.print(table)
