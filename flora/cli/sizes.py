"""Bytes and lengths as people write them."""

import re

from flora.errors import UsageError

_UNITS = {"": 1, "B": 1,
          "K": 10**3, "KB": 10**3, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9, "T": 10**12, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)")


def parse_bytes(text: str) -> int:
    """`100MB` -> 100_000_000, `4GiB` -> 4 * 2**30, `4096` -> 4096. Raises UsageError."""
    match = _SIZE.fullmatch(text.strip())
    factor = _UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise UsageError(f"{text[:40]!r} is not a size", fix="write a number with a unit, such as 100MB or 4GiB")
    return int(float(match[1]) * factor)


def parse_length(text: str) -> int:
    """`4096` or `4k` -> 4096: tokens, where k is 1024. Raises UsageError."""
    match = re.fullmatch(r"([0-9]{1,9})([kK]?)", text.strip())
    if match is None or int(match[1]) == 0:
        raise UsageError(f"{text[:40]!r} is not a number of tokens", fix="write 4096, or 4k for the same")
    return int(match[1]) * (1024 if match[2] else 1)


def show_bytes(num_bytes: int) -> str:
    """3575296 -> `3.6 MB`."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
