"""Content addresses: sha256 of bytes, of files and of canonical JSON."""

import hashlib
from pathlib import Path
from typing import Any

from flora.canonical import canonical_json
from flora.names import Digest

_READ_BYTES = 1 << 22


def digest_bytes(data: bytes | memoryview) -> Digest:
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def digest_file(path: Path) -> Digest:
    """Digest of the file's bytes, read in pieces of 4 MiB."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            sha256.update(piece)
    return Digest("sha256:" + sha256.hexdigest())


def digest_json(value: Any) -> Digest:
    return digest_bytes(canonical_json(value))
