"""The schemas of `docs/json/`, for tests to hold answers against."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry, Resource

FOLDER = Path(__file__).parents[2] / "docs" / "json"
SHARED = "shared.schema.json"


@cache
def schemas() -> dict[str, Any]:
    """File name -> schema."""
    return {file.name: json.loads(file.read_text()) for file in sorted(FOLDER.glob("*.schema.json"))}


@cache
def by_command() -> dict[str, str]:
    """What a schema says that it holds for, such as `show --lineage` -> its file's name."""
    return {command: name for name, schema in schemas().items() for command in schema.get("commands", ())}


def schema_for(words: Sequence[str]) -> str | None:
    """The file of the schema that a command line's answer has: the most specific whose words it contains."""
    fitting = [command for command in by_command() if set(command.split()) <= set(words)]
    fitting = [command for command in fitting if words[: len(_verbs(command))] == _verbs(command)]
    return by_command()[max(fitting, key=len)] if fitting else None


def check_answer(words: Sequence[str], answer: Any, *, closed: bool = False) -> None:
    """Raises jsonschema's ValidationError. With `closed` no key may be there that the schema does not name."""
    name = schema_for(list(words))
    assert name is not None, f"no schema of docs/json says that it holds for: {' '.join(words)}"
    _validator(name, closed).validate(answer)


def check_error(answer: Any) -> None:
    _validator("error.schema.json", True).validate(answer)


@cache
def _validator(name: str, closed: bool) -> Draft202012Validator:
    known = {each: _closed(schema) if closed else schema for each, schema in schemas().items()}
    resources = [(each, Resource.from_contents(schema)) for each, schema in known.items()]
    return Draft202012Validator(known[name], registry=Registry().with_resources(resources))


def _verbs(command: str) -> list[str]:
    return [word for word in command.split() if not word.startswith("-")]


def _closed(schema: Any) -> Any:
    """The schema with no room for other keys, wherever it names any and does not ask for room."""
    if not isinstance(schema, dict):
        return schema
    shut = dict(schema)
    if "properties" in schema:
        shut["properties"] = {name: _closed(each) for name, each in schema["properties"].items()}
    if "$defs" in schema:  # open themselves: what refers to one may name keys besides, and is closed
        shut["$defs"] = {name: _closed(each) for name, each in schema["$defs"].items()}
        for each in shut["$defs"].values():
            each.pop("unevaluatedProperties", None)
    if "items" in schema:
        shut["items"] = _closed(schema["items"])
    if {"properties", "allOf", "$ref"} & set(schema) and "additionalProperties" not in schema:
        shut["unevaluatedProperties"] = False
    return shut
