"""A process that was started here, ended for certain."""

import subprocess


def end_child(process: subprocess.Popen[str] | subprocess.Popen[bytes], patience_s: float) -> int:
    """Its exit code, once it is gone: asked by SIGTERM, and by force if it is still there after `patience_s`."""
    process.terminate()
    try:
        return process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
