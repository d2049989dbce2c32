"""`flora serve` as a user starts it: a process of its own, on a port that it chose itself, stopped at the end."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

START_S = 120
_SERVING_AT = re.compile(r"serving at (http://[^\s\"]+)")
_OWN_PORTS = range(20_000, 32_000)  # below those that the system gives to whoever asks for any


def free_port() -> int:
    """For a command that must be told its port: one that no socket of another test is given meanwhile."""
    while True:
        port = random.SystemRandom().choice(_OWN_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@contextmanager
def running_server(base: Path | None, *flags: str, env: Mapping[str, str] | None = None) -> Iterator[str]:
    """The URL of a server that serves. Its stderr is shown if it does not start or does not end well."""
    command = [sys.executable, "-m", "flora", "serve", *([str(base)] if base else []), "--port", "0", *flags]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=os.environ | dict(env or {}), stderr=log, stdout=subprocess.DEVNULL)
        try:
            yield wait_until_serving(process, log)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        except BaseException:
            sys.stderr.write(text_of(log)[-8000:])
            raise
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def wait_until_serving(process: subprocess.Popen, log: IO[str]) -> str:
    """The URL that the server says it serves at, once it does."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if found := _SERVING_AT.search(text_of(log)):
            return found[1]
        if process.poll() is not None:
            raise AssertionError(f"flora serve ended with code {process.returncode} before it served")
        time.sleep(0.02)  # a look at what another process has written, bounded by the deadline
    raise AssertionError(f"flora serve did not serve within {START_S} s")


def text_of(log: IO[str]) -> str:
    """All that was written until now; the writer's place in the file is not moved."""
    size = os.fstat(log.fileno()).st_size
    return os.pread(log.fileno(), size, 0).decode(errors="replace")
