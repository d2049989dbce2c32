"""The tables and drawings of docs/study.md, from the rows of study.py.

    python benchmarks/real/study_page.py            # writes them;  --check: says whether they are what the rows say

A table stands between `<!-- table NAME -->` and `<!-- end -->`. Of each task the rows with the most questions count, of
those the ones measured last.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from levels import ENERGIES, RANKS, SIZES

from flora.bench.plots import Curve, Plot
from flora.cli.bench_plot import draw_plot

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "benchmarks" / "results" / "real_study.jsonl"
PAGE = ROOT / "docs" / "study.md"
TASKS = ("lemma", "g2p")
SPENDERS = (("rank", "uniform rank"), ("module energy", "one energy for each module"), ("budget", "one budget"))
_X = "kept energy of the whole change, %"
_Y = "exact match, %"
_BY_RANK = Plot("Exact match against rank", "at", "rank", (), _Y, is_x_log=True, y_scale=100.0)
_BY_ENERGY = Plot("Exact match against kept energy", "kept", _X, (), _Y, y_scale=100.0)
_BY_BYTES = Plot(
    "Exact match against bytes, spent in three ways",
    "bytes",
    "MB of factors in bf16",
    (),
    _Y,
    is_x_log=True,
    y_scale=100.0,
)

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    results = Results(json.loads(line) for line in args.rows.read_text().splitlines())
    files = {PAGE: fill(PAGE.read_text(), tables(results))}
    files |= {PAGE.parent / name: text for name, text in drawings(results).items()}
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{'differs from the rows' if args.check else 'written'}: {path.relative_to(ROOT)}")
        if not args.check:
            path.write_text(files[path])
    sys.exit(3 if args.check and stale else 0)


class Results:
    """The rows that count."""

    def __init__(self, rows: Iterable[Row]) -> None:
        rows = list(rows)
        most = {
            task: max(row["questions"] for row in rows if row["task"] == task) for task in {r["task"] for r in rows}
        }
        self._rows = {
            (row["task"], row["how"], row["scope"], row["at"]): row
            for row in rows
            if row["questions"] == most[row["task"]]
        }

    def row(self, task: str, how: str, scope: str | None = None, at: float | None = None) -> Row:
        return self._rows[task, how, scope, at]

    def rows(self) -> Iterable[Row]:
        return self._rows.values()

    def some(self, task: str, how: str, scope: str, at: Sequence[float]) -> list[Row]:
        """Those of these rows that were measured."""
        keys = [(task, how, scope, level) for level in at]
        return [self._rows[key] for key in keys if key in self._rows]


def points(row: Row) -> tuple[float, float]:
    """What the row loses against the fine-tune, in points of exact match, and the standard error of that.

    Both answered the same questions, so only those that one of them answers right say anything.
    """
    count, lost, gained = row["questions"], row["lost"], row["gained"]
    mean = (lost - gained) / count
    return 100 * mean, 100 * math.sqrt(((gained + lost) / count - mean**2) / count)


def fill(page: str, found: dict[str, str]) -> str:
    """The page with each table in its place."""
    for name, table in found.items():
        place = re.compile(rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, times = place.subn(lambda match, table=table: f"{match[1]}\n{table}\n{match[2]}", page)
        assert times == 1, f"the page has {times} places for the table {name}"
    return page


def tables(results: Results) -> dict[str, str]:
    found = {"checkpoints": _checkpoints(results)}
    for task in TASKS:
        found[f"ranks {task}"] = _ranks(results, task)
        found[f"energies {task}"] = _energies(results, task)
        found[f"bytes {task}"] = _bytes(results, task)
    return found | {"ranks sort": _ranks(results, "sort"), "energies sort": _energies(results, "sort")}


def drawings(results: Results) -> dict[str, str]:
    by_rank, by_energy, by_bytes = list[Curve](), list[Curve](), list[Curve]()
    for task in TASKS:
        for scope, word in (("linear", "linear layers"), ("all", "embeddings and norms too")):
            ranks = results.some(task, "rank", scope, RANKS)
            by_rank.append(_curve(f"{task}: {word}", [(row["at"], row) for row in ranks]))
            if scope == "linear":
                by_energy.append(_curve(f"{task}: uniform ranks, {word}", _by_energy(ranks)))
        energies = results.some(task, "energy", "all", ENERGIES)
        by_energy.append(_curve(f"{task}: per-module energy, {word}", _by_energy(energies)))
        by_rank.append(_level(results, task, RANKS[0], RANKS[-1]))
        for how, word in SPENDERS:
            rows = results.some(task, how, "all", SIZES)
            by_bytes.append(_curve(f"{task}: {word}", [(row["bytes"] / 1e6, row) for row in rows]))
    return {
        "study_rank.svg": draw_plot(_BY_RANK, _drawn(by_rank)),
        "study_energy.svg": draw_plot(_BY_ENERGY, _drawn(by_energy)),
        "study_bytes.svg": draw_plot(_BY_BYTES, _drawn(by_bytes)),
    }


def _drawn(curves: Iterable[Curve]) -> list[Curve]:
    return [curve for curve in curves if curve.points]


def _by_energy(rows: Iterable[Row]) -> Iterable[tuple[float, Row]]:
    return [(100 * row["kept_share"], row) for row in rows]


def _curve(name: str, rows: Iterable[tuple[float, Row]]) -> Curve:
    return Curve(name, tuple(sorted((x, 100 * row["exact_match"]) for x, row in rows)))


def _level(results: Results, task: str, low: float, high: float) -> Curve:
    share = 100 * results.row(task, "tuned")["exact_match"]
    return Curve(f"{task}: the fine-tune itself", ((low, share), (high, share)))


def _kept(row: Row) -> str:
    return f"{row['kept_share']:.2f}"


def _checkpoints(results: Results) -> str:
    rows = []
    for task in TASKS:
        for how, scope, word in (
            ("base", None, "base"),
            ("tuned", None, "fine-tune"),
            ("uncut", "linear", "base with the fine-tune's linear layers, uncut"),
        ):
            row = results.row(task, how, scope)
            rows.append([task, word, _match(row), _points(row) if how == "uncut" else "", _nll(row)])
    return _table(["task", "model", "exact match", "lost", "nats"], rows, "ll")


def _ranks(results: Results, task: str) -> str:
    rows = []
    for rank in RANKS:
        cells = [str(rank)]
        for scope in ("linear", "all"):
            found = results.some(task, "rank", scope, [rank])
            cells += [cell for row in found for cell in (_megabytes(row), _kept(row), *_answers(row))] or [""] * 5
        rows.append(cells)
    heads = ["MB", "kept", "exact match", "lost", "nats"]
    return _table(["rank", *(f"{scope}: {head}" for scope in ("linear", "all") for head in heads)], rows)


def _energies(results: Results, task: str) -> str:
    rows = []
    for energy in ENERGIES:
        for row in results.some(task, "energy", "all", [energy]):
            cells = [f"{energy:g}", _megabytes(row), "{} to {}".format(*row["ranks"]), *_answers(row)]
            for pruned in results.some(task, "prune", "all", [energy]):
                cells += [*_answers(pruned), f"{100 * pruned['equal_ranks']:.3g} %", f"{pruned['distance']:.1e}"]
            rows.append(cells + [""] * (11 - len(cells)))
    extracted = ["energy", "MB", "ranks", "exact match", "lost", "nats"]
    return _table([*extracted, "pruned: exact match", "lost", "nats", "equal ranks", "distance"], rows)


def _bytes(results: Results, task: str) -> str:
    rows = []
    for size in SIZES:
        for how, word in SPENDERS:
            for row in results.some(task, how, "all", [size]):
                ranks = "{} to {}".format(*row["ranks"])
                rows.append([word, ranks, _megabytes(row), f"{row['kept_share']:.3f}", *_answers(row)])
    return _table(["spent by", "ranks", "MB", "kept", "exact match", "lost", "nats"], rows, "l")


def _answers(row: Row) -> tuple[str, str, str]:
    """Exact match, points lost against the fine-tune, nats a token."""
    return _match(row), _points(row), _nll(row)


def _megabytes(row: Row) -> str:
    return f"{row['bytes'] / 1e6:.1f}"


def _match(row: Row) -> str:
    return f"{row['exact_match']:.3f} ± {row['stderr']:.3f}"


def _points(row: Row) -> str:
    mean, error = points(row)
    return f"{mean:.1f} ± {error:.1f}"


def _nll(row: Row) -> str:
    return f"{row['nll']:.3f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], left: str = "") -> str:
    """A Markdown table whose first `len(left)` columns are words."""
    rule = ["---" if i < len(left) else "---:" for i in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows)) + "\n"


if __name__ == "__main__":
    main()
