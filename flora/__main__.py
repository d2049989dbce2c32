"""The process behind the `flora` command, and behind `python -m flora`."""

import gc


def run() -> int:
    """One command line in a process of its own; its exit code."""
    gc.set_threshold(50_000, *gc.get_threshold()[1:])  # at 700 the import of torch alone collects a thousand times
    from flora.cli import main

    code = main()
    gc.freeze()  # what is left at the end is not searched for cycles, which a short command would wait for
    return code


if __name__ == "__main__":
    raise SystemExit(run())
