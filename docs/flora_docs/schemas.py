"""What `--json` prints, as tables, from the schemas in `docs/json/`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHARED = "shared.schema.json"
ERROR = "error.schema.json"


def schema_sections(folder: Path) -> str:
    """A section for each schema: the commands that it holds for, its keys, and a link to it."""
    definitions = json.loads((folder / SHARED).read_text(encoding="utf-8"))["$defs"]
    files = sorted(folder.glob("*.schema.json"), key=lambda file: (file.name != ERROR, file.name))
    return "\n\n".join(_section(file, definitions) for file in files if file.name != SHARED)


def _section(file: Path, definitions: dict[str, Any]) -> str:
    schema = json.loads(file.read_text(encoding="utf-8"))
    lines = [f"## {schema['title']}", "", f"{schema['description']} [{file.name}](json/{file.name})", ""]
    lines += ["| key | type | |", "| --- | --- | --- |"]
    for key, kind, meaning in _rows(schema, definitions, ""):
        lines.append(f"| `{key}` | {kind} | {meaning} |")
    return "\n".join(lines)


def _rows(schema: dict[str, Any], definitions: dict[str, Any], prefix: str) -> Iterator[tuple[str, str, str]]:
    """(key, type, meaning) of every property, those of nested objects behind it."""
    for key, told in _properties(schema, definitions).items():
        if key == "schema_version":
            continue
        whole = _resolved(told, definitions)
        path = f"{prefix}{key}"
        yield path, _kind(whole), whole.get("description", "")
        items = _resolved(whole.get("items", {}), definitions)
        if _properties(items, definitions):
            yield from _rows(items, definitions, f"{path}[].")
        elif _properties(whole, definitions):
            yield from _rows(whole, definitions, f"{path}.")


def _properties(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Those of the schema and of all that it says it is besides."""
    found = dict(schema.get("properties", {}))
    for each in [*schema.get("allOf", []), *schema.get("anyOf", [])]:
        found |= _properties(_resolved(each, definitions), definitions)
    return found


def _resolved(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema with what it refers to, its own words first."""
    if "$ref" not in schema:
        return schema
    name = schema["$ref"].rpartition("/")[2]
    return _resolved(definitions[name], definitions) | {key: value for key, value in schema.items() if key != "$ref"}


def _kind(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    kinds = schema.get("type", "object" if "properties" in schema else "any")
    return " or ".join([kinds] if isinstance(kinds, str) else kinds)
