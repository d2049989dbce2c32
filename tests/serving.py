"""`flora serve` as a user starts it: a process of its own, on a free port, stopped at the end."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

START_S = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running_server(base: Path | None, *flags: str, env: Mapping[str, str] | None = None) -> Iterator[str]:
    """The URL of a server that answers /health. Its stderr is shown if it does not start or does not end well."""
    port = free_port()
    command = [sys.executable, "-m", "flora", "serve", *([str(base)] if base else []), "--port", str(port), *flags]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=os.environ | dict(env or {}), stderr=log, stdout=subprocess.DEVNULL)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_healthy(url, process)
            yield url
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read()[-8000:])
            raise
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def wait_until_healthy(url: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"flora serve ended with code {process.returncode} before it answered")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.05)  # a poll of another process's state, bounded by the deadline
    raise AssertionError(f"{url} did not answer within {START_S} s")
