"""A child is gone when its end was asked for, whether it listens or not."""

import signal
import subprocess
import sys

from flora.child_process import end_child

LISTENS = "print('here', flush=True); import signal; signal.pause()"
IGNORES = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('here', flush=True); signal.pause()"


def started(script: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.stdout.close()
    return process


def test_a_child_that_listens_ends_by_itself():
    assert end_child(started(LISTENS), patience_s=60) == -signal.SIGTERM


def test_a_child_that_does_not_listen_is_killed_when_patience_ends():
    assert end_child(started(IGNORES), patience_s=0.05) == -signal.SIGKILL


def test_a_child_that_is_gone_already_keeps_its_exit_code():
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    process.wait()

    assert end_child(process, patience_s=0) == 3
