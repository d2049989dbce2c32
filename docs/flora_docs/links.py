"""Links that hold for readers of the repository and of the site alike."""

import os
import re
from pathlib import Path

# Pages of the repository's root, and where they stand on the site
ROOT_PAGES = {
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/NOTES.md": "notes.md",
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def relink(markdown: str, page: str, root: Path) -> str:
    """The page with links as the site has them. Of what the site does not hold, such as a script, the words stay."""
    source = next((source for source, there in ROOT_PAGES.items() if there == page), f"docs/{page}")

    def replace(link: re.Match[str]) -> str:
        is_image, words, target, anchor = link[1], link[2], link[3], link[4] or ""
        there = os.path.normpath(os.path.join(os.path.dirname(source), target))
        if there in ROOT_PAGES:
            found = ROOT_PAGES[there]
        elif there == "docs/adr":
            found = f"adr/{min(file.name for file in (root / there).glob('*.md'))}"
        elif there.startswith("docs/") and ((root / there).is_file() or not (root / there).suffix):
            found = there.removeprefix("docs/")
        else:
            return words
        return f"{is_image}[{words}]({os.path.relpath(found, os.path.dirname(page) or '.')}{anchor})"

    return _LINK.sub(replace, markdown)


def title_of(file: Path) -> str:
    """A page's first heading."""
    heading = re.search(r"^# (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return heading[1].replace("`", "") if heading else file.stem
