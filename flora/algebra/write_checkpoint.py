"""A checkpoint like another but for some tensors: streamed file by file, whole or not at all.

A changed tensor keeps its dtype and shape, so every file keeps its header and every tensor its place: headers, and all
bytes of tensors that nothing changes, are copied as they are.
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from flora.adapter import CHAT_TEMPLATE, GENERATION_CONFIG
from flora.canonical import indented_json
from flora.checkpoint import Checkpoint, TensorInfo
from flora.errors import StoreError, UsageError

RECORD_FILE = "flora_merge.json"
_KEPT = (
    ".json",
    ".jinja",
    ".txt",
    ".model",
    ".py",
)  # configuration and tokenizer; weights of other formats stay behind
_PIECE = 16 << 20  # bytes copied at once


def check_target(base: Checkpoint, out: Path) -> None:
    """Raises UsageError if `out` holds anything, StoreError if its disk has too little room."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there already", fix="give --out a new folder")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    needed, free = base.num_bytes, shutil.disk_usage(parent).free
    if needed > free:
        raise StoreError(
            f"{out} needs {needed} bytes, and its disk has {free}", fix="free some room, or give another --out"
        )


def write_checkpoint(
    base: Checkpoint,
    out: Path,
    changes: Mapping[str, Callable[[Tensor], Tensor]],
    extras: Mapping[str, bytes],
    record: Mapping[str, Any],
    progress: Callable[[str, float], None] | None = None,
) -> None:
    """Writes `base` with `changes` to the new folder `out`; one changed tensor is in memory at a time.

    changes   by tensor name: from the base's tensor to the new one, of the same dtype and shape
    extras    an adapter's chat template and end tokens, which take the place of the base's
    record    how the folder came to be, for flora_merge.json
    progress  told each file's name as it grows, and the share of all bytes written

    Raises UsageError (something is there already), StoreError (disk full or not writable).
    """
    check_target(base, out)
    out = out.absolute()
    temporary = out.parent / f".{out.name}.{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        _copy_sidecars(base, temporary, extras, record)
        _write_files(base, temporary, changes, progress)
        if out.exists():
            out.rmdir()  # empty, as check_target saw
        os.rename(temporary, out)
    except OSError as error:
        raise StoreError(f"{out} cannot be written", cause=error.strerror or str(error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_files(
    base: Checkpoint,
    folder: Path,
    changes: Mapping[str, Callable[[Tensor], Tensor]],
    progress: Callable[[str, float], None] | None,
) -> None:
    by_file: dict[Path, list[TensorInfo]] = {}
    for info in base.tensors.values():
        by_file.setdefault(info.file, []).append(info)
    total, done = sum(file.stat().st_size for file in by_file), 0
    for file, infos in by_file.items():
        changed = sorted((info for info in infos if info.name in changes), key=lambda info: info.start)
        with file.open("rb") as source, (folder / file.name).open("wb") as target:
            for info in changed:
                _copy(source, target, info.start - target.tell())
                target.write(_bytes(changes[info.name](base.load(info.name)), info))
                source.seek(info.end)
                if progress:
                    progress(info.name, (done + info.end) / total)
            _copy(source, target, None)
            target.flush()
            os.fsync(target.fileno())
        done += file.stat().st_size
        if progress:
            progress(file.name, done / total)


def _copy(source: BinaryIO, target: BinaryIO, num_bytes: int | None) -> None:
    """The next `num_bytes`, or all that is left."""
    left = num_bytes
    while left is None or left > 0:
        piece = source.read(_PIECE if left is None else min(_PIECE, left))
        if not piece:
            return
        target.write(piece)
        left = None if left is None else left - len(piece)


def _bytes(tensor: Tensor, info: TensorInfo) -> memoryview:
    assert tuple(tensor.shape) == info.shape
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    assert len(data) == info.num_bytes
    return data


def _copy_sidecars(base: Checkpoint, folder: Path, extras: Mapping[str, bytes], record: Mapping[str, Any]) -> None:
    for file in sorted(base.path.iterdir()):
        if file.is_file() and file.suffix in _KEPT and file.name != RECORD_FILE:
            shutil.copyfile(file, folder / file.name)
    if CHAT_TEMPLATE in extras:
        (folder / CHAT_TEMPLATE).write_bytes(extras[CHAT_TEMPLATE])
    if GENERATION_CONFIG in extras:
        file = folder / GENERATION_CONFIG
        settings = json.loads(file.read_bytes()) if file.exists() else {}
        file.write_bytes(indented_json(settings | json.loads(extras[GENERATION_CONFIG])))
    (folder / RECORD_FILE).write_bytes(indented_json(record))
