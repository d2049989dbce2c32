"""The command reference: each verb as its `--help` has it, from the same objects."""

import re
from collections.abc import Iterator
from enum import Enum
from functools import cache
from typing import Any

_INTRODUCTION = "`flora VERB --help` shows the same on a terminal.\n"
_OTHERS = "Options"  # of an option that has no panel of its own


@cache
def _verbs() -> dict[str, dict[str, Any]]:
    """Panel -> verb, as it is typed -> command."""
    import typer.main

    from flora.cli.app import make_app

    panels: dict[str, dict[str, Any]] = {}
    for name, command in typer.main.get_command(make_app()).commands.items():  # type: ignore[attr-defined]
        panel = panels.setdefault(command.rich_help_panel or "Others", {})
        members = getattr(command, "commands", None)
        if members is None:
            panel[name] = command
        else:
            panel |= {f"{name} {member}": each for member, each in members.items()}
    return panels


def verbs() -> dict[str, Any]:
    """Every verb, as it is typed behind `flora`, and its command."""
    return {name: command for panel in _verbs().values() for name, command in panel.items()}


def pages() -> dict[str, str]:
    """A page for each panel of `flora --help`."""
    return {panel: f"commands/{re.sub(r'[^a-z]+', '-', panel.lower())}.md" for panel in _verbs()}


def panel_page(panel: str) -> str:
    sections = [_section(name, command) for name, command in _verbs()[panel].items()]
    return "\n".join([f"# {panel}\n", _INTRODUCTION, *sections])


def _section(name: str, command: Any) -> str:
    text, _, examples = command.help.partition("[bold]Example")
    lines = [line.strip() for line in examples.partition("[/bold]")[2].splitlines() if line.strip()]
    parts = [f"## flora {name}\n", f"    {_usage(name, command)}\n", _plain(text).strip() + "\n"]
    parts += ["Examples:\n", "```bash", *lines, "```\n"] if lines else []
    for title, options in _panels_of(command).items():
        parts += [f"| {title} | |", "| --- | --- |", *map(_row, options), ""]
    return "\n".join(parts)


def _usage(name: str, command: Any) -> str:
    words = [_metavar(param) for param in command.params if _is_argument(param)]
    words += [
        f"{param.opts[0]} {_metavar(param)}" for param in command.params if param.required and not _is_argument(param)
    ]
    return " ".join(["flora", name, *words, "[OPTIONS]"])


def _panels_of(command: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for param in command.params:
        if not getattr(param, "hidden", False) and "--help" not in param.opts:
            panel = "Arguments" if _is_argument(param) else getattr(param, "rich_help_panel", None) or _OTHERS
            found.setdefault(panel, []).append(param)
    return found


def _row(param: Any) -> str:
    return f"| {_spelling(param)} | {'. '.join(_facts(param))} |"


def _facts(param: Any) -> Iterator[str]:
    if param.help:
        yield _plain(param.help).rstrip(".").replace("|", "\\|")
    if choices := _choices(param):
        yield "One of " + ", ".join(f"`{choice}`" for choice in choices)
    default = param.default() if callable(param.default) else param.default
    if default not in (None, False, "", ()) and not _is_argument(param) and not param.is_flag:
        yield f"Default: `{getattr(default, 'value', default)}`"
    elif default is True and param.secondary_opts:
        yield f"Default: `{param.opts[0]}`"
    if param.envvar:
        yield f"Environment: `{param.envvar}`"


def _spelling(param: Any) -> str:
    if _is_argument(param):
        return f"`{_metavar(param)}`"
    names = ", ".join(f"`{name}`" for name in [*param.opts, *param.secondary_opts])
    return names if param.is_flag or _choices(param) else f"{names} `{_metavar(param)}`"


def _metavar(param: Any) -> str:
    word = str(param.metavar or (param.name.upper() if _is_argument(param) else "VALUE"))
    word += "..." if param.nargs == -1 and not word.endswith("...") else ""
    return f"[{word}]" if _is_argument(param) and not param.required and not word.startswith("[") else word


def _choices(param: Any) -> list[str]:
    kind = param.type_descriptor.annotation
    return [str(each.value) for each in kind] if isinstance(kind, type) and issubclass(kind, Enum) else []


def _is_argument(param: Any) -> bool:
    return str(param.param_type_name) == "argument"


def _plain(text: str) -> str:
    """rich's markup as Markdown's."""
    return re.sub(r"\[/?bold\]", "**", text).replace("<", "&lt;")
