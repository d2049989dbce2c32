"""The base id: which weights an adapter belongs to, by content and not by name.

A base record lists every tensor of a checkpoint with its sha256; the base id is the digest of that record. Hashing
reads every byte once, so each file's hashes are cached by path, size and mtime.
"""

import json
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from threading import Event

import msgspec

from flora.checkpoint import Checkpoint, TensorInfo
from flora.digests import digest_bytes, digest_json
from flora.names import Digest


class TensorRecord(msgspec.Struct, frozen=True):
    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str  # hex, of the stored bytes


class BaseRecord(msgspec.Struct, frozen=True):
    """Every tensor of one checkpoint, in the order of names."""

    tensors: tuple[TensorRecord, ...]
    schema_version: int = 1

    @property
    def base_id(self) -> Digest:
        return digest_json(msgspec.to_builtins(self))

    def hashes(self) -> dict[str, str]:
        return {tensor.name: tensor.sha256 for tensor in self.tensors}


def base_record(
    checkpoint: Checkpoint,
    cache_dir: Path | None = None,
    check: Callable[[], None] | None = None,
    num_threads: int | None = None,
) -> BaseRecord:
    """The record of an open checkpoint.

    cache_dir  holds the hashes of files seen before; None reads everything afresh
    check      called before each tensor is read; what it raises ends the work
    num_threads  None: one for each core
    """
    by_file: dict[Path, list[TensorInfo]] = {}
    for info in checkpoint.tensors.values():
        by_file.setdefault(info.file, []).append(info)
    hashes: dict[str, str] = {}
    for file, infos in by_file.items():
        hashes |= _file_hashes(file, infos, cache_dir, check, num_threads)
    return BaseRecord(
        tuple(
            TensorRecord(info.name, info.dtype, info.shape, hashes[info.name]) for info in checkpoint.tensors.values()
        )
    )


@contextmanager
def records_beside(
    checkpoints: Sequence[Checkpoint], cache_dir: Path | None
) -> Iterator[Callable[[], list[BaseRecord]]]:
    """Makes their records in a thread, beside whatever else is done; calling what this yields waits for them.

    Half of the cores are left to that. Leaving the block stops it at the next tensor.
    """
    stop = Event()

    def check() -> None:
        if stop.is_set():
            raise CancelledError

    with ThreadPoolExecutor(1) as pool:
        half = max(1, (os.cpu_count() or 1) // 2)
        future = pool.submit(lambda: [base_record(one, cache_dir, check, half) for one in checkpoints])
        try:
            yield future.result
        finally:
            stop.set()


def _file_hashes(
    file: Path,
    infos: list[TensorInfo],
    cache_dir: Path | None,
    check: Callable[[], None] | None,
    num_threads: int | None,
) -> dict[str, str]:
    stat = file.stat()
    path = str(file.resolve())
    key = {"path": path, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    cached = cache_dir / f"{digest_bytes(path.encode()).hex}.json" if cache_dir else None
    if cached and cached.exists():
        known = _read_cache(cached)
        if known.get("key") == key and set(known.get("sha256", ())) == {info.name for info in infos}:
            return known["sha256"]
    hashes = _hash_tensors(file, infos, check, num_threads)
    if cached:
        _write_atomically(cached, json.dumps({"key": key, "sha256": hashes}).encode())
    return hashes


def _hash_tensors(
    file: Path, infos: Iterable[TensorInfo], check: Callable[[], None] | None, num_threads: int | None
) -> dict[str, str]:
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
        whole = memoryview(view)

        def hash_one(info: TensorInfo) -> tuple[str, str]:
            if check:
                check()
            with whole[info.start : info.end] as piece:
                return info.name, sha256(piece).hexdigest()

        try:
            with ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:  # hashlib lets go of the interpreter lock
                return dict(pool.map(hash_one, infos))
        finally:
            whole.release()


def _read_cache(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}  # a damaged cache entry is only a reason to hash again
    return value if isinstance(value, dict) else {}


def _write_atomically(path: Path, data: bytes) -> None:
    """Writes the file whole or not at all; a full disk or a read-only folder costs the cache, not the run."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".hashes-")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
