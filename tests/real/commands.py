"""Flora's commands, run as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path


def flora(*args: str | Path, **env: str) -> dict:
    """The JSON that `flora ARGS` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "flora", *map(str, args)], capture_output=True, text=True, env=os.environ | env
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
