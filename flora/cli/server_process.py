"""A `flora serve` of our own: started, waited for, and ended for certain."""

from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flora.child_process import end_child
from flora.errors import ServeError

_SERVING_AT = re.compile(r"serving at (http://\S+)")
_START_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 20.0
_LAST_LINES = 15


@contextmanager
def running_server(arguments: Sequence[str], home: Path) -> Iterator[str]:
    """Gives the URL of `flora serve ARGUMENTS`, once it serves. Raises ServeError with its last words."""
    process = subprocess.Popen(
        [sys.executable, "-m", "flora", "serve", "--port", "0", *arguments],
        env=os.environ | {"FLORA_HOME": str(home), "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    reader = _LogReader(process)
    try:
        yield reader.wait_for_url(time.monotonic() + _START_TIMEOUT_S)
    finally:
        end_child(process, _END_TIMEOUT_S)


class _LogReader:
    """Reads the log to its end, so that the server never blocks on it, and keeps its last lines."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._last: deque[str] = deque(maxlen=_LAST_LINES)
        self._urls: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def wait_for_url(self, deadline_s: float) -> str:
        try:
            url = self._urls.get(timeout=max(0.0, deadline_s - time.monotonic()))
        except queue.Empty:
            url = None
        if url is None:
            raise ServeError(
                "`flora serve` did not come up",
                cause="\n".join(self._last) or "it said nothing",
                fix="start it alone to see all that it says; `flora doctor` checks this machine",
            )
        return url

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._last.append(line.rstrip())
            if match := _SERVING_AT.search(line):
                self._urls.put(match[1])
        self._urls.put(None)
