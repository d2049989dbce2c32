"""The pages beside the code keep up with it: links lead somewhere, verbs and flags exist."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from flora.cli.app import make_app

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"]
APP = make_app()
GROUPS = {group.name or "": group.typer_instance for group in APP.registered_groups}
VERBS = sorted([*(command.name or "" for command in APP.registered_commands), *GROUPS])


@pytest.mark.parametrize("page", PAGES)
def test_every_link_between_pages_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text())

    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_verb_that_a_page_names_exists(page):
    assert set(re.findall(r"`flora ([a-z]+)", (ROOT / page).read_text())) <= set(VERBS)


def test_every_verb_that_a_message_or_docstring_names_exists():
    files = sorted((ROOT / "flora").rglob("*.py"))
    named = {(verb, path.name) for path in files for verb in re.findall(r"`flora ([a-z]+)", path.read_text())}

    assert [found for found in sorted(named) if found[0] not in VERBS] == []


def test_every_flag_that_the_readme_names_is_a_flag():
    named = set(re.findall(r"--[a-z][a-z-]+", (ROOT / "README.md").read_text()))

    assert named <= {flag for command in commands_of(typer.main.get_command(APP)) for flag in flags_of(command)}


def commands_of(command: Any) -> Iterator[Any]:
    yield command
    for one in getattr(command, "commands", {}).values():
        yield from commands_of(one)


def flags_of(command: Any) -> Iterator[str]:
    """Long options, as --help shows them."""
    yield "--help"
    for option in command.params:
        if not getattr(option, "hidden", False):
            yield from (flag for flag in (*option.opts, *option.secondary_opts) if flag.startswith("--"))
