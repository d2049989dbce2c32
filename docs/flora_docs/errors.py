"""Codes, exit codes and HTTP statuses of every error, from the classes and from the table at the top of their file."""

import re
from collections.abc import Iterator

from flora import errors
from flora.errors import FloraError

_LINE = re.compile(r"^[ │├└─]*(\w+) +(\d) +(FL-\w+)(?: +(.*))?$", re.MULTILINE)
BUG = "FL-BUG"  # what the command line calls an error that is none of these


def classes(root: type[FloraError] = FloraError) -> Iterator[type[FloraError]]:
    """Every error, each before those that descend from it."""
    yield root
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from classes(child)


def meanings() -> dict[str, str]:
    """Code -> what the table in `flora/errors.py` says of it."""
    return {code: meaning for _, _, code, meaning in _LINE.findall(errors.__doc__ or "")}


def error_table() -> str:
    said = meanings()
    rows = ["| code | exit code | what happened |", "| --- | ---: | --- |"]
    for each in classes():
        rows.append(f"| `{each.code}` | {each.exit_code} | {said.get(each.code, '')} |")
    rows.append(f"| `{BUG}` | 1 | Flora did not expect this: a bug, or something of this machine |")
    return "\n".join(rows)


def http_table() -> str:
    from flora.serve.api.errors import envelope, status_of

    rows = ["| code | status | `error.type` | `error.code` |", "| --- | ---: | --- | --- |"]
    for each in classes():
        error = each("…")
        told = envelope(error)["error"]
        rows.append(f"| `{each.code}` | {status_of(error)} | `{told['type']}` | `{told['code']}` |")
    return "\n".join(rows)
