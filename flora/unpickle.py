"""Pickled weights to safetensors, in a process of their own: `python -m flora.unpickle FOLDER TARGET`.

Opening a pickle can run whatever its maker wrote into it. torch's weights_only reader builds tensors and nothing else;
should it err, it errs in a child without our environment, whose only product is a folder of safetensors that is read
like any stranger's. Only `flora extract --allow-pickle` comes here; registry and server never do.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from flora.checkpoint import PICKLE_SUFFIXES
from flora.errors import CheckpointError, PickleRefused

_SIDECARS = (".json", ".jinja", ".model", ".txt")
_MAX_SIDECAR_BYTES = 64 << 20
_INNER = ("state_dict", "model", "module")  # where trainers keep the weights in a dict of other things


def convert_pickles(folder: Path, parent: Path) -> Path:
    """A folder of the same name in `parent` with the weights of `folder` as safetensors, and its small files.

    Raises PickleRefused if a file holds anything but tensors, CheckpointError if it cannot be read.
    """
    target = parent / (folder.absolute().name or "checkpoint")
    target.mkdir(parents=True)
    for path in folder.iterdir():
        is_sidecar = path.is_file() and path.suffix in _SIDECARS and not path.name.endswith(".index.json")
        if is_sidecar and path.stat().st_size <= _MAX_SIDECAR_BYTES:
            shutil.copyfile(path, target / path.name)
    done = subprocess.run(
        [sys.executable, "-m", "flora.unpickle", str(folder.absolute()), str(target.absolute())],
        capture_output=True,
        text=True,
        cwd=target,
        env={"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode == 0:
        return target
    lines = done.stderr.strip().splitlines() or ["the reading process died"]
    if done.returncode == _REFUSED:
        raise PickleRefused(
            f"{folder} holds pickled weights that are no plain tensors",
            cause=lines[-1][:300],
            fix="do not open it elsewhere either, unless you trust its maker; ask for safetensors",
        )
    raise CheckpointError(f"the pickled weights of {folder} cannot be read", cause=lines[-1][:300])


_REFUSED = 3


def _weight_files(folder: Path) -> list[Path]:
    """The pickles that hold weights: the usual names if there are any, else all."""
    pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    return [path for path in pickles if path.name.startswith("pytorch_model")] or pickles


def _convert(file: Path, target: Path) -> None:
    """One pickle to one safetensors file. Raises UnpicklingError, ValueError for what is no dict of tensors."""
    import torch
    from safetensors.torch import save_file

    weights = torch.load(file, map_location="cpu", weights_only=True)
    for name in _INNER:
        if isinstance(weights, dict) and isinstance(weights.get(name), dict):
            weights = weights[name]
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f"{file.name} holds a {type(weights).__name__}, not named tensors")
    stranger = next((name for name, value in weights.items() if not isinstance(value, torch.Tensor)), None)
    if stranger is not None:
        raise ValueError(f"{file.name} holds {str(stranger)[:80]!r}, which is no tensor")
    # a storage that two names share is written under both
    save_file({str(name): tensor.detach().contiguous().clone() for name, tensor in weights.items()}, target)


def _main(folder: str, target: str) -> int:
    import pickle
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number, file in enumerate(_weight_files(Path(folder)), start=1):
        try:
            _convert(file, Path(target) / f"model-{number:05d}.safetensors")
        except (pickle.UnpicklingError, ValueError) as error:
            sys.stderr.write(" ".join(str(error).split())[:280] + "\n")
            return _REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
