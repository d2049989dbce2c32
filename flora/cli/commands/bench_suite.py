"""`flora bench suite`, `claims` and `figures`: all that is claimed, measured in one go, held against bounds, drawn."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flora.cli import bench_options as flag
from flora.cli.bench_tables import print_entries, print_findings
from flora.cli.options import AsJson
from flora.cli.output import choose_format, note
from flora.cli.sizing import resolve_device
from flora.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from flora.bench.claims import Finding
    from flora.bench.suites import Entry

_FULL = dict.fromkeys(("pool", "host_cache", "max_len", "max_sequences", "max_batch_tokens", "loaders", "threads"))
_SMALL = _FULL | {"pool": "32MiB", "max_sequences": 8, "max_batch_tokens": 64, "loaders": 0, "threads": 1}


def suite(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]…", help="table, linear, base, storm, http, drawn, invariant, after, paper, fp8, leak; all."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="For rows as they come; those there are not repeated."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="LABEL", help="These measurements alone. Repeatable.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", metavar="TIME", help="8m, 90s: begin nothing that would take longer.")
    ] = None,
    small: Annotated[
        bool, typer.Option("--small", help="So small that a CPU runs all of it in a minute: a rehearsal, no figures.")
    ] = False,
    show: Annotated[bool, typer.Option("--list", help="Say what would be measured, and what is there.")] = False,
    device: flag.DeviceName = "auto",
    dtype: flag.Dtype = "auto",
    pool: flag.Pool = None,
    host_cache: flag.HostCache = None,
    loaders: flag.Loaders = None,
    threads: flag.Threads = None,
    gpu: flag.GpuName = None,
    scratch: flag.Scratch = None,
    commit: flag.Commit = None,
    as_json: AsJson = False,
) -> None:
    """Measure what Flora claims: many measurements in the order of their worth, resumed where they were cut off.

    Neighbours share a device that is made ready once; each has an engine of its own that knows of no adapter. A row is
    written as soon as it is there, so that an end at any moment leaves valid rows, and another call goes on from them.

    [bold]Examples[/bold]

      flora bench suite table http storm --out rows.jsonl --budget 9m

      flora bench suite --small --out rehearsal.jsonl
    """
    from flora.bench.facts import Surroundings
    from flora.bench.row import append_row, commit_of_this_code, read_rows
    from flora.bench.suite import SuiteRun, is_measured, told

    form = choose_format(as_json=as_json, ids_only=False)
    device, dtype = resolve_device(device, dtype)
    entries = _entries(
        names, only, small, device, dtype, pool=pool, host_cache=host_cache, loaders=loaders, threads=threads
    )
    where = Surroundings(commit or commit_of_this_code(), gpu or flag.gpu_name(device))
    before = read_rows(out) if out and out.exists() else []
    if show:
        print_entries(form, [(entry, is_measured(entry, before, where)) for entry in entries])
        return
    if out is None:
        raise UsageError("--out is missing", fix="name the file that rows go to, or give --list")
    logging.getLogger("flora.serve").setLevel(logging.ERROR)  # of a thousand adapters, a line each
    budget_s = flag.seconds_of(budget, "--budget") if budget else float("inf")
    run = SuiteRun(entries, before, where, budget_s=budget_s, scratch=scratch, tell=note)
    for row in run.rows():
        append_row(out, row)
    outcome = run.outcome
    counts = f"{len(outcome.done)} measured, {len(outcome.left)} left"
    note(": ".join(filter(None, (counts, ", ".join(outcome.left)))))
    print_findings(form, _findings([out]))
    if outcome.failed:
        label, error = next(iter(outcome.failed.items()))
        raise CheckFailed(f"{len(outcome.failed)} measurements failed, {label} first", cause=told(error))


def claims(
    files: Annotated[list[Path], typer.Argument(metavar="ROWS…", help="JSON lines with labels, of any benchmark.")],
    strict: Annotated[bool, typer.Option("--strict", help="Exit 3 where a bound does not hold.")] = False,
    as_json: AsJson = False,
) -> None:
    """Hold rows against what is claimed: each figure, its bound, what was measured.

    [bold]Examples[/bold]

      flora bench claims suite.jsonl latency.jsonl
    """
    found = _findings(files)
    print_findings(choose_format(as_json=as_json, ids_only=False), found)
    missed = [finding for finding in found if not finding.holds]
    if strict and missed:
        raise CheckFailed(f"{len(missed)} of {len(found)} bounds do not hold")


def figures(
    files: Annotated[list[Path], typer.Argument(metavar="ROWS…", help="JSON lines with labels, of any benchmark.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder that SVGs go to.")],
) -> None:
    """Draw every figure of the claims that these rows have points for, one SVG each.

    [bold]Examples[/bold]

      flora bench figures suite.jsonl cost.jsonl --out docs
    """
    from flora.bench.figures import drawable, drawable_bars
    from flora.bench.row import read_rows
    from flora.cli.bench_bars import draw_bars
    from flora.cli.bench_plot import draw_plot

    out.mkdir(parents=True, exist_ok=True)
    rows = [row for file in files for row in read_rows(file)]
    for figure, plot, curves in drawable(rows):
        (out / f"{figure.name}.svg").write_text(draw_plot(plot, curves, figure.title), encoding="utf-8")
        note(f"{figure.name}.svg: {len(curves)} curves")
    for bars, values in drawable_bars(rows):
        (out / f"{bars.name}.svg").write_text(draw_bars(bars.title, bars.unit, values), encoding="utf-8")
        note(f"{bars.name}.svg: {len(values)} bars")


def _findings(files: list[Path]) -> list[Finding]:
    from flora.bench.claims import findings_of
    from flora.bench.row import read_rows

    return findings_of([row for file in files for row in read_rows(file)])


def _entries(
    names: list[str] | None, only: list[str] | None, small: bool, device: str, dtype: str, **engine: Any
) -> list[Entry]:
    """What was asked for. Raises UsageError."""
    from flora.bench.suites import FULL, SMALL, SUITES, entries_of

    for name in names or []:
        flag.one_of(SUITES, name, "suite")
    sizes: dict[str, Any] = dict(_SMALL if small else _FULL) | {k: v for k, v in engine.items() if v is not None}
    config = flag.make_engine_config(device, dtype, max_adapters=flag.MAX_ADAPTERS, prefix_cache=False, **sizes)
    entries = entries_of(names or list(SUITES), config, SMALL if small else FULL)
    by_label = {entry.label: entry for entry in entries}
    for label in only or []:
        flag.one_of(by_label, label, "--only")
    return [entry for entry in entries if not only or entry.label in only]
