"""What is done of an extraction, on disk: an interrupted run goes on from there and loses only the pairs in work.

Each finished pair is one safetensors file, written beside and then renamed, so a file is whole or absent whenever the
process is killed; tensors are checked by sha256 before they are believed. A journal belongs to the very files, configs
and options of its run: any other run has another.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import IO, Any

import torch
from torch import Tensor

import flora
from flora.adapter import tensor_sha256
from flora.checkpoint import Checkpoint
from flora.extract.change import Change
from flora.extract.config import ExtractConfig
from flora.extract.fit import Fit
from flora.extract.pair import TensorPair
from flora.extract.plan import ExtractionPlan
from flora.lowrank import LowRank

_STALE_S = 7 * 86400.0  # after which a journal that nobody went on with is taken away
_PLAIN = ("norm_squared", "noise", "num_changed", "signal_rank", "signal_energy", "tied", "lost")


class Journal:
    """The finished pairs of one extraction. Safe for the threads of one run; another run of the same is kept out."""

    def __init__(self, folder: Path, lock: IO[bytes], plan: ExtractionPlan) -> None:
        self._folder = folder
        self._lock = lock
        self._places = {pair.name: place for place, pair in enumerate(plan.pairs)}
        self.num_resumed = 0  # pairs that were found done
        self._counting = Lock()  # adding to a field is a read and a write: Python does not promise them as one

    @classmethod
    def open(cls, base: Checkpoint, tuned: Checkpoint, config: ExtractConfig, plan: ExtractionPlan) -> "Journal | None":
        """The journal of this run, emptied unless it is to be resumed; None where none is kept.

        None too if another process writes it at this moment, or the folder cannot be written: the work goes on without.
        """
        if config.journal_dir is None:
            return None
        folder = config.journal_dir / _key(base, tuned, config)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / "lock").open("ab")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return None
        if not config.resume:
            for file in folder.glob("*.safetensors"):
                file.unlink()
        _sweep(config.journal_dir, but=folder)
        return cls(folder, lock, plan)

    def load(self, change: Change) -> Change | None:
        """What became of the pair of this still empty change, if that is on record and sound."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._file(change), framework="pt") as file:
                record = json.loads((file.metadata() or {})["change"])
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        if record.get("pair") != _describe(change.pair) or any(
            record["sha256"].get(name) != tensor_sha256(tensor) for name, tensor in tensors.items()
        ):
            return None
        with self._counting:
            self.num_resumed += 1
        return replace(
            change,
            fit=_fit(tensors, record["scale"]),
            energies=tensors.get("energies"),
            whole=tensors.get("whole"),
            seconds=record["seconds"],
            **{name: record[name] for name in _PLAIN},
        )

    def save(self, change: Change) -> None:
        """Records a finished pair. A full disk costs the record, not the run."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {name: tensor.clone() for name, tensor in _tensors(change).items()}
        record = {name: getattr(change, name) for name in _PLAIN} | {
            "pair": _describe(change.pair),
            "scale": change.fit.factors.scale if change.fit else 1.0,
            "seconds": dict(change.seconds),
            "sha256": {name: tensor_sha256(tensor) for name, tensor in tensors.items()},
        }
        file = self._file(change)
        temporary = file.with_suffix(".writing")
        with suppress(OSError, SafetensorError):
            save_file(tensors, temporary, metadata={"change": json.dumps(record)})
            os.replace(temporary, file)

    def release(self) -> None:
        """Leaves what is on record to a later run."""
        self._lock.close()

    def discard(self) -> None:
        """Takes the journal away: its adapter is stored."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()

    def _file(self, change: Change) -> Path:
        return self._folder / f"{self._places[change.pair.name]:06}.safetensors"


def _tensors(change: Change) -> dict[str, Tensor]:
    found: dict[str, Tensor | None] = {"energies": change.energies, "whole": change.whole}
    if change.fit is not None:
        found |= {"A": change.fit.factors.A, "B": change.fit.factors.B, "kept": change.fit.kept}
    return {name: tensor.cpu() for name, tensor in found.items() if tensor is not None} or {"none": torch.zeros(1)}


def _describe(pair: TensorPair) -> dict[str, Any]:
    """What the pair was taken for. Libraries are asked too, which may know more at the next run."""
    return {"name": pair.name, "status": pair.status, "kind": pair.kind, "shape": list(pair.shape)}


def _fit(tensors: Mapping[str, Tensor], scale: float) -> Fit | None:
    if "A" not in tensors:
        return None
    return Fit(LowRank(A=tensors["A"], B=tensors["B"], scale=scale), tensors["kept"])


def _key(base: Checkpoint, tuned: Checkpoint, config: ExtractConfig) -> str:
    """What one run is: files by path, size and time of change, configs by content, the options, and the code."""
    options = replace(config, cache_dir=None, journal_dir=None, resume=False, strict=False)
    marks: list[Any] = [flora.__version__, torch.__version__, repr(options)]
    for side in (base, tuned):
        marks.append(dict(side.config))  # by which tensors are read: gpt2's lie as [in, out]
        for file in sorted({info.file.resolve() for info in side.tensors.values()}):
            status = file.stat()
            marks.append((str(file), status.st_size, status.st_mtime_ns))
    return sha256(json.dumps(marks, sort_keys=True).encode()).hexdigest()[:32]


def _sweep(root: Path, but: Path) -> None:
    """Takes journals that are old and that no process holds."""
    for folder in root.iterdir():
        with suppress(OSError):
            if folder == but or time.time() - folder.stat().st_mtime < _STALE_S:
                continue
            with (folder / "lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
