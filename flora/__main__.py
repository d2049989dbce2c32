"""The process behind the `flora` command, and behind `python -m flora`."""

import gc

from flora.startup import prepare_process


def run() -> int:
    """One command line in a process of its own; its exit code."""
    prepare_process()
    from flora.cli import main

    code = main()
    gc.freeze()  # what is left at the end is not searched for cycles, which a short command would wait for
    return code


if __name__ == "__main__":
    raise SystemExit(run())
