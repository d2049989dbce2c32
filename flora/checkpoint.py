"""Reading a Hugging Face checkpoint: safetensors only, memory-mapped, one tensor at a time."""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flora.errors import AuthError, CheckpointError, NotFound, PickleRefused, RemoteError, UsageError
from flora.nearby import spelled_alike, with_weights_inside

if TYPE_CHECKING:
    from torch import Tensor

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_INDEX_FILES = ("*.safetensors.index.json", "*.safetensors.index.*.json")  # diffusers', and those of variants: fp16
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
FLOAT_DTYPES = ("F64", "F32", "BF16", "F16")
_MAX_JSON_BYTES = 64 << 20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(?:/[A-Za-z0-9][\w.\-]*)?", re.ASCII)
_HUB_SNAPSHOT = re.compile(r"/models--(?P<id>[\w.\-]+)/snapshots/[^/]+$", re.ASCII)
_HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model"]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `file[start:end]`, row-major, little-endian."""

    name: str
    dtype: str  # safetensors' word: BF16, F16, F32, …
    shape: tuple[int, ...]
    file: Path
    start: int  # bytes from the start of the file
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An open checkpoint. Tensors are read when asked for; nothing is held but file maps."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]  # in the order of their names
    _maps: dict[Path, Any] = field(default_factory=dict, repr=False)

    def load(self, name: str) -> "Tensor":
        """The tensor in its stored dtype and shape, on the CPU, backed by the file's map: do not write to it."""
        from safetensors import SafetensorError, safe_open

        info = self.tensors[name]
        try:
            if info.file not in self._maps:
                self._maps[info.file] = safe_open(info.file, framework="pt")
            return self._maps[info.file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"tensor {name} of {info.file} cannot be read", cause=str(error)) from error

    def load_row(self, name: str, index: int) -> "Tensor":
        """`load(name)[index]`, for which nothing else of the tensor is read."""
        return self.load(name)[index]  # a view of the map

    @cached_property
    def name(self) -> str:
        """What the checkpoint calls itself: the Hub id of its config or of the Hub's cache, or its folder's name."""
        recorded = self.config.get("_name_or_path")
        if isinstance(recorded, str) and _HUB_ID.fullmatch(recorded):  # and no path of the machine it was made on
            return recorded
        path = self.path.absolute()
        if cached := _HUB_SNAPSHOT.search(path.as_posix()):
            return cached["id"].replace("--", "/", 1)
        return path.name or path.resolve().name

    @property
    def architecture(self) -> str:
        names = self.config.get("architectures") or [self.config.get("_class_name", "unknown")]  # or diffusers' word
        return str(names[0])

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.tensors.values())

    def sidecar(self, name: str) -> bytes | None:
        """The bytes of a small file beside the weights (`chat_template.jinja`, `generation_config.json`), if there."""
        path = self.path / name
        return path.read_bytes() if path.is_file() else None


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens the checkpoint in folder `path` by its headers alone.

    Raises NotFound (no such folder), PickleRefused (only .bin or .pt weights), CheckpointError (no weights, a truncated
    or inconsistent file, a tensor that the index names and no file holds).
    """
    if not path.is_dir():
        fix = "give a Hugging Face checkpoint folder or a Hub id such as org/name"
        if path.suffix == ".safetensors":
            fix = f"give the folder that it lies in: {path.parent}"
        raise NotFound(f"{path} is not a folder", fix=fix)
    index = _find_index(path)
    tensors: dict[str, TensorInfo] = {}
    for file in _indexed_files(index) if index else _weight_files(path):
        for info in read_header(file):
            if info.name in tensors:
                raise CheckpointError(
                    f"tensor {info.name} stands in both {tensors[info.name].file.name} and {file.name} of {path}",
                    fix="shards of two checkpoints are mixed here: fetch the folder again",
                )
            tensors[info.name] = info
    if index:
        _check_index(index, tensors)
    return Checkpoint(
        path=path,
        config=_read_json(path / "config.json") if (path / "config.json").exists() else {},
        tensors={name: tensors[name] for name in sorted(tensors)},
    )


def locate_checkpoint(source: str) -> Path:
    """The local folder of `source`: itself if it is one, else the Hub snapshot of that id, downloaded if need be.

    Raises NotFound, AuthError, RemoteError (offline and not in the cache), UsageError (neither a folder nor an id).
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        near = spelled_alike(path)
        fix = f"did you mean {near}?" if near else "check the path, or give a Hub id such as org/name"
        raise NotFound(f"there is no folder {source}", fix=fix)
    return _download(source)


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    near = spelled_alike(Path(repo_id))
    guess = f"did you mean the folder {near}? Else " if near else ""
    offline = RemoteError(
        f"{repo_id} is no folder here, and the Hugging Face Hub cannot be reached",
        cause="there is no network, HF_HUB_OFFLINE is set, or HF_ENDPOINT names a host that does not answer",
        fix=f"{guess}give a local folder, or download it where there is a network: hf download {repo_id}",
    )
    try:
        return Path(snapshot_download(repo_id, allow_patterns=_HUB_PATTERNS))
    except HFValidationError as error:
        raise UsageError(
            f"{repo_id!r} is neither a folder nor a Hub id",
            cause=str(error),
            fix=f"{guess}give a folder, or an id such as org/name",
        ) from error
    except GatedRepoError as error:
        raise AuthError(f"{repo_id} is gated", fix="accept its terms on the Hub, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise NotFound(
            f"there is no folder {repo_id} here and no such model on the Hub",
            fix=f"{guess}check the spelling; a private model needs `hf auth login` first",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise offline from error
    except Exception as error:
        if is_connection_error(error):
            raise offline from error
        raise


def is_connection_error(error: Exception) -> bool:
    """Whether `error` is the Hub client's word for no connection: which HTTP library's it is depends on its version."""
    return type(error).__module__.partition(".")[0] in {"httpx", "httpx2", "httpcore", "httpcore2", "requests"}


def read_header(file: Path) -> Iterator[TensorInfo]:
    """Every tensor of one safetensors file, from its header. Raises CheckpointError if the file is not sound."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):  # the library's own check of lengths, offsets, overlaps and holes
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file} does not exist", fix="the download or the copy is incomplete: fetch it again"
        ) from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} is not a complete safetensors file",
            cause=str(error),
            fix="it may be a truncated download or a Git LFS pointer: fetch it again",
        ) from error
    header.pop("__metadata__", None)
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        yield TensorInfo(name, entry["dtype"], tuple(entry["shape"]), file, 8 + length + start, 8 + length + end)


def _find_index(path: Path) -> Path | None:
    """The file that says which tensor lies in which shard; None where there is none, or one file has them all.

    Raises CheckpointError where several do and do not say the same, of which none has the name that transformers reads.
    """
    if (path / INDEX_FILE).exists():
        return path / INDEX_FILE
    if (path / SINGLE_FILE).exists():
        return None
    found = sorted({file for pattern in _INDEX_FILES for file in path.glob(pattern)})
    found = [file for file in found if not file.name.startswith("adapter_")]
    if any(_weight_map(file) != _weight_map(found[0]) for file in found[1:]):
        raise CheckpointError(
            f"{path} holds {len(found)} indices of shards that do not agree: {', '.join(file.name for file in found)}",
            cause="a model and a variant of it, such as fp16, lie in one folder",
            fix="give a folder with one of them: link or copy its index, its shards and config.json there",
        )
    return found[0] if found else None


def _indexed_files(index: Path) -> list[Path]:
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        if os.sep in name or name.startswith(".."):
            raise CheckpointError(f"{index} names {name!r}, which is not a file of this folder")
    return [index.parent / name for name in names]


def _weight_files(path: Path) -> list[Path]:
    """The weights of a folder without an index."""
    if (path / SINGLE_FILE).exists():
        return [path / SINGLE_FILE]
    loose = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("adapter_"))
    if loose:
        return loose
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise PickleRefused(
            f"{path} holds its weights as {pickles[0]}, a pickle file that can run code when it is opened",
            fix="save it again as safetensors: model.save_pretrained(folder); or `flora extract --allow-pickle`, which "
            "reads tensors only, in a process of its own",
        )
    if (path / "adapter_model.safetensors").exists():
        raise CheckpointError(
            f"{path} is an adapter, not a checkpoint", fix="give the folder of the full model that it was made from"
        )
    if (path / "model_index.json").exists():
        parts = sorted(part.name for part in path.iterdir() if part.is_dir() and any(part.glob("*.safetensors")))
        raise CheckpointError(
            f"{path} is a diffusers pipeline of {len(parts)} models, not one checkpoint",
            fix="extract one component at a time, the same on both sides: "
            + ", ".join(f"{path.name}/{part}" for part in parts),
        )
    inside = with_weights_inside(path)
    raise CheckpointError(
        f"{path} holds no safetensors weights",
        fix=f"give the folder that does: {inside}" if inside else f"a checkpoint has {SINGLE_FILE} or {INDEX_FILE}",
    )


def _check_index(index: Path, tensors: Mapping[str, TensorInfo]) -> None:
    missing = sorted(set(_weight_map(index)) - set(tensors))
    if missing:
        raise CheckpointError(
            f"{index} names {len(missing)} tensors that no file holds, {missing[0]} among them",
            fix="a shard is missing or from another checkpoint: fetch the folder again",
        )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map", fix="fetch the folder again")
    return weight_map


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has more than {_MAX_JSON_BYTES >> 20} MiB, too much for a configuration")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON", cause=str(error)) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value
