"""A blob in parts: the list of ranges of other blobs that its bytes are, one after the other, in place of its file.

It is how equal tensors of different adapters lie on the disk once: each is a blob of its own, and the weights files
that have it name it. Readers get the ranges as they lie, so nothing is put together again.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from flora.digests import digest_bytes


class Part(msgspec.Struct, frozen=True):
    """A range of a blob that has a file."""

    digest: str
    start: int  # byte
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class Span:
    """A range of a file."""

    path: Path
    start: int
    size: int


_DECODER = msgspec.json.Decoder(tuple[Part, ...])


def encode_parts(parts: Iterable[Part]) -> bytes:
    """A line with the sha256 of the next one, which is JSON."""
    listed = msgspec.json.encode(list(parts))
    return f"{digest_bytes(listed).hex}\n".encode() + listed


def parse_parts(data: bytes) -> tuple[Part, ...] | None:
    """The parts that `data` lists; None if it is damaged: who collects garbage must know them all or none."""
    sha256, _, listed = data.partition(b"\n")
    if sha256.decode("ascii", "replace") != digest_bytes(listed).hex:
        return None
    try:
        return _DECODER.decode(listed)
    except msgspec.DecodeError:  # of a later Flora, perhaps
        return None


def join_parts(parts: Iterable[Part]) -> list[Part]:
    """The same bytes by as few parts as there can be: neighbors in one blob are one."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if last and last.digest == part.digest and last.start + last.size == part.start:
            joined[-1] = Part(last.digest, last.start, last.size + part.size)
        else:
            joined.append(part)
    return joined
