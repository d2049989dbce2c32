"""Where the time of an extraction went, in words."""

from collections.abc import Iterator, Mapping, Sequence

_SHOWN = 0.05  # seconds; less rounds to nothing


def times(seconds: Mapping[str, float], num_workers: int) -> Iterator[str]:
    """Lines: by the clock, and what the workers did meanwhile.

    seconds  `ExtractResult.timings`, and `write`, which is no part of their total
    """
    steps = [
        ("tensors", seconds["work"]),
        ("waiting for the files' hashes", seconds["hashes"]),
        ("making the adapter", seconds["finish"]),
        ("writing", seconds["write"]),
    ]
    yield f"{seconds['total'] + seconds['write']:.1f} s" + _show(": ", steps)
    stages = [("reading", seconds["read"]), ("copying", seconds["copy"])]
    computed = seconds["factorize"] + seconds["fit"]
    if seconds["copy"] > 0:
        stages.append(("computing", computed + seconds["delta"]))
    else:  # files are mapped, and read by what subtracts them
        stages = [("reading and subtracting", seconds["read"] + seconds["delta"]), ("computing", computed)]
    if shown := _show(": ", stages):
        yield f"of {num_workers} worker{'s' * (num_workers > 1)}, summed{shown}"


def _show(lead: str, parts: Sequence[tuple[str, float]]) -> str:
    shown = [f"{name} {seconds:.1f}" for name, seconds in parts if seconds >= _SHOWN]
    return lead + ", ".join(shown) if shown else ""
