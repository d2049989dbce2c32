"""A process that was started here, ended for certain."""

import signal
import subprocess


def end_child(process: subprocess.Popen[str] | subprocess.Popen[bytes], patience_s: float) -> int:
    """Its exit code, once it is gone: asked by SIGTERM, and by force if it is still there after `patience_s`."""
    process.terminate()
    try:
        return process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def how_it_ended(code: int) -> str:
    """An exit code in words, as subprocess and asyncio give it: of a process that a signal ended it is negative."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # one of those without a name
        return f"killed by signal {-code}"
