"""Weights files cut up: their large tensors that other files have too become blobs, and the rest another one."""

import hashlib
from collections.abc import Collection, Iterable, Iterator

from flora.adapter import AdapterHeader
from flora.digests import digest_bytes
from flora.registry.formats.spelling import is_transposed
from flora.registry.parts import Part, join_parts
from flora.registry.store import Blob, BlobStore

MIN_SHARED_BYTES = 1 << 20  # opening a file of its own costs a reader less than a tenth of reading that much
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}


def large_tensors(header: AdapterHeader, stored: Iterable[tuple[str, memoryview]]) -> dict[str, int]:
    """Sizes of the tensors of a weights file that are worth sharing, by the digest of their bytes in that file.

    stored  the file's tensors by name; only those are read whose bytes the header does not know: a table's factors are
            stored transposed
    """
    sizes: dict[str, int] = {}
    has_tables = False
    for module in header.modules:
        item = _ITEM_BYTES[module.dtype]
        factors = ((module.a_sha256, module.in_features), (module.b_sha256, module.out_features))
        for sha256, features in factors:
            if (size := module.rank * features * item) >= MIN_SHARED_BYTES:
                if module.kind == "embedding":
                    has_tables = True
                else:
                    sizes[f"sha256:{sha256}"] = size
    for tensor in header.exact_tensors:
        size = _ITEM_BYTES[tensor.dtype]
        for length in tensor.shape:
            size *= length
        if size >= MIN_SHARED_BYTES:
            sizes[f"sha256:{tensor.sha256}"] = size
    if has_tables:
        for name, data in stored:
            if is_transposed(name) and len(data) >= MIN_SHARED_BYTES:
                sizes[str(digest_bytes(data))] = len(data)
    return sizes


def put_cut(
    store: BlobStore, pieces: Iterable[bytes | memoryview], wanted: Collection[str]
) -> tuple[Blob, list[Part] | None]:
    """Stores the bytes of the file that `pieces` make up, with each piece of a digest in `wanted` as a blob of its own.

    Returns what the file is and where its bytes lie: `replace_by_parts` then lets these stand for it. None: the file
    has none of the wanted pieces and is stored as it is. A wanted piece is written only where it is not there or not
    sound. Raises StoreError.
    """
    sha256 = hashlib.sha256()
    cut: list[tuple[str | None, int]] = []  # digest of a piece of its own, or None for the rest; size

    def rest() -> Iterator[bytes | memoryview]:
        for piece in pieces:
            sha256.update(piece)
            digest = digest_bytes(piece) if len(piece) >= MIN_SHARED_BYTES else None
            if digest and str(digest) in wanted:
                cut.append((str(digest), len(piece)))
                if not store.is_sound(digest):
                    store.put([piece])
            else:
                cut.append((None, len(piece)))
                yield piece

    own = store.put(rest())
    if all(digest is None for digest, _ in cut):
        return own, None
    parts, own_end = [], 0
    for digest, size in cut:
        if digest is None:
            parts.append(Part(own.digest, own_end, size))
            own_end += size
        else:
            parts.append(Part(digest, 0, size))
    return Blob(f"sha256:{sha256.hexdigest()}", sum(size for _, size in cut)), join_parts(parts)
