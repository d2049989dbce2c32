"""How far long work has come: a bar on a terminal, a plain line every few seconds elsewhere. On stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flora.cli.output import note

Report = Callable[[float, str], None]  # (share done, what is at hand)

_LINE_EVERY_S = 5.0


@contextmanager
def progress(title: str, *, is_quiet: bool = False) -> Iterator[Report]:
    """Gives the function that long work reports to."""
    if is_quiet:
        yield lambda share, detail: None
    elif sys.stderr.isatty():
        with _bar(title) as report:
            yield report
    else:
        yield _lines(title)


@contextmanager
def _bar(title: str) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[detail]}", markup=True),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=1.0, detail="")
        yield lambda share, detail: bar.update(task, completed=share, detail=detail)


def _lines(title: str, clock: Callable[[], float] = time.monotonic) -> Report:
    started_s = last_s = clock()

    def report(share: float, detail: str) -> None:
        nonlocal last_s
        now_s = clock()
        if now_s - last_s >= _LINE_EVERY_S:
            last_s = now_s
            note(f"{title}: {100 * share:.0f} %, {detail}, {now_s - started_s:.0f} s")

    return report
