"""The server's routes and metrics, from the code that answers and counts."""

import ast
from collections.abc import Iterator
from pathlib import Path

import flora.serve.api as api

_FOLDER = Path(api.__file__).parent


def metrics() -> dict[str, str]:
    """Name -> what it counts: neighboring strings of `metrics.py`, of which the first is a metric's name."""
    found = {}
    for node in _nodes(_FOLDER / "metrics.py"):
        values = node.args if isinstance(node, ast.Call) else node.elts if isinstance(node, ast.Tuple) else []
        words = [
            value.value for value in values[:2] if isinstance(value, ast.Constant) and isinstance(value.value, str)
        ]
        if len(words) == 2 and words[0].startswith(("vllm:", "flora:")):
            found[words[0]] = words[1]
    return found


def metric_table() -> str:
    rows = [f"| `{name}` | {meaning} |" for name, meaning in sorted(metrics().items())]
    return "\n".join(["| metric | |", "| --- | --- |", *rows])


def routes() -> list[str]:
    """`METHOD /path` of every route."""
    found = []
    for file in sorted(_FOLDER.glob("*.py")):
        for node in _nodes(file):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("router.get", "router.post", "router.delete"):
                method = ast.unparse(node.func).rpartition(".")[2].upper()
                found.append(f"{method} {ast.literal_eval(node.args[0])}")
    return found


def _nodes(file: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(file.read_text(encoding="utf-8")))
