"""Every error that a command can meet is in three parts: what happened, and what to do; the cause where it is known."""

import ast
from collections.abc import Iterator
from pathlib import Path

from flora_docs.errors import classes

from flora.errors import FloraError

PACKAGE = Path(__file__).parents[1] / "flora"
CLASSES = {each.__name__: each for each in classes()}
# A server's answers have OpenAI's shape and go to programs; the benchmarks' go to whoever works on Flora.
OTHERS = ("serve/", "bench/", "kernels/", "cli/commands/bench_suite.py")


def raised() -> Iterator[tuple[str, type[FloraError], ast.Call]]:
    """(place, class, call) of every error that is made by name in what commands run."""
    for file in sorted(PACKAGE.rglob("*.py")):
        place = str(file.relative_to(PACKAGE))
        if not place.startswith(OTHERS):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CLASSES:
                    yield f"{place}:{node.lineno}", CLASSES[node.func.id], node


def words_of(node: ast.expr) -> str:
    """The fixed words of a message; a placeholder is one word."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else "X"


def test_every_error_says_what_to_do():
    sites = list(raised())
    silent = [
        place
        for place, kind, call in sites
        if kind.usual_fix is None and not any(word.arg in ("fix", None) for word in call.keywords)
    ]

    assert len(sites) > 250
    assert silent == []


def test_the_first_line_stands_alone():
    """No sentence after another, no full stop, nothing that only what stands around it would explain."""
    lines = {place: words_of(call.args[0]) for place, _, call in raised() if call.args}

    assert [place for place, line in lines.items() if line.endswith(".") or "\n" in line or ". " in line] == []


def test_a_fix_of_the_site_comes_before_the_classes():
    assert CLASSES["RemoteError"]("x").fix == CLASSES["RemoteError"].usual_fix
    assert CLASSES["RemoteError"]("x", fix="wait").fix == "wait"
    assert CLASSES["UsageError"]("x").fix is None
