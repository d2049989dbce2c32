"""The JSON that docs/registry.md promises is the JSON that commands print."""

import re
from pathlib import Path

import pytest

DOCUMENT = (Path(__file__).parents[2] / "docs" / "registry.md").read_text()


def promised(command: str) -> tuple[str | None, list[str]]:
    """The list's name, if the answer is a list, and the keys of its rows or of the answer itself."""
    row = next(line for line in DOCUMENT.splitlines() if re.match(rf"\| .*`{re.escape(command)}`", line))
    keys = re.findall(r"`([\w\[\]]+)`", row.split("|")[2])
    return (keys[0].removesuffix("[]"), keys[1:]) if keys[0].endswith("[]") else (None, keys)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("ls", ["ls"]),
        ("show", ["show", "sql"]),
        ("show --lineage", ["show", "sql", "--lineage"]),
        ("search", ["search"]),
        ("label", ["label", "sql", "a=b"]),
        ("tag", ["tag", "sql", "canary"]),
        ("promote", ["promote", "sql"]),
        ("push", ["push", "sql", "ann/sql", "--dry-run"]),
        ("pull", ["pull", "../drawer"]),
        ("compat", ["compat", "sql"]),
        ("gc", ["gc"]),
        ("registry events", ["registry", "events"]),
    ],
)
def test_answers_have_the_keys_that_are_documented(stored, command, words):
    stored("export", "sql", "--out", "../drawer")
    kind, keys = promised(command)

    answer = stored(*words, "--json").json

    assert answer.pop("schema_version") == 1
    if kind is None:
        assert list(answer) == keys
    else:
        assert list(answer) == [kind]
        found = list(answer[kind][0])
        assert set(keys) <= set(found) if command == "registry events" else found == keys
