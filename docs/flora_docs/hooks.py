"""MkDocs' hooks: pages that the code writes, placeholders that it fills, and links that lead out of `docs/`."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parents[1]))  # MkDocs loads this file by its path, not as part of a package

from flora_docs import cli, engines, errors, links, results, schemas, server

ROOT = Path(__file__).parents[2]
_PLACEHOLDER = re.compile(r"<!-- flora:(\w+) -->")
_FILLERS: dict[str, Callable[[], str]] = {
    "claims": lambda: results.claims_table(ROOT / "benchmarks" / "results"),
    "engines": engines.engine_table,
    "errors": errors.error_table,
    "http_errors": errors.http_table,
    "metrics": server.metric_table,
    "results": lambda: results.result_sections(ROOT / "benchmarks" / "results"),
    "schemas": lambda: schemas.schema_sections(ROOT / "docs" / "json"),
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts into the navigation what is found: a page for each panel of verbs, the decisions, and every other page."""
    nav = config.nav or []
    _section(nav, "Commands").extend({title: page} for title, page in cli.pages().items())
    adrs = [*sorted((ROOT / "docs" / "adr").glob("*.md"))]
    _section(nav, "Decisions").extend({links.title_of(file): f"adr/{file.name}"} for file in adrs)
    named = set(_named(nav))
    others = sorted(file for file in (ROOT / "docs").glob("*.md") if file.name not in named)
    _section(nav, "Studies").extend({links.title_of(file): file.name} for file in others)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for panel, page in cli.pages().items():
        files.append(File.generated(config, page, content=cli.panel_page(panel)))
    for source, page in links.ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    filled = _PLACEHOLDER.sub(lambda found: _FILLERS[found[1]](), markdown)
    return links.relink(filled, page.file.src_uri, ROOT)


def _section(nav: list[Any], title: str) -> list[Any]:
    return next(entry[title] for entry in nav if isinstance(entry, dict) and title in entry)


def _named(entries: list[Any]) -> list[str]:
    """Every page that a navigation names."""
    pages: list[str] = []
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            pages += _named(value) if isinstance(value, list) else [value]
    return pages
