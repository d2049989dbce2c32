"""What a server gets where nothing is said: from the device, the base and the memory that is free. Without torch."""

import re
from dataclasses import dataclass
from pathlib import Path

from flora.cli.machine import available_memory_bytes, gpus, num_cores
from flora.errors import UsageError

_MIN_POOL_BYTES = 64 << 20
_MAX_CPU_POOL_BYTES = 4 << 30  # tokens of a CPU server rarely need more
_CPU_POOL_SHARE = 0.25  # of the memory that the base leaves; the system and its file cache need the rest
_GPU_POOL_SHARE = 0.85  # of what the base leaves: activations, graphs and the allocator's slack take the rest
_HOST_CACHE_SHARE = 0.125  # of the host's available memory
_MAX_HOST_CACHE_BYTES = 8 << 30
_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,3})?")
_ADAPTER_DTYPES = {"auto": None, "float8": "float8_e4m3fn"}
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Pace:
    """What suits a kind of device where nothing is said."""

    max_sequences: int
    max_batch_tokens: int
    max_loaders: int

    def num_loaders(self) -> int:
        return min(self.max_loaders, num_cores() // 2)  # the other half is the engine's and the front end's


PACE = {"cpu": Pace(64, 512, 0), "cuda": Pace(256, 2048, 8)}


def resolve_device(device: str, dtype: str) -> tuple[str, str]:
    """Device and dtype with "auto" replaced by what this machine has. Raises UsageError."""
    if device == "auto":
        device = "cuda" if gpus() else "cpu"
    if not _DEVICE.fullmatch(device):
        raise UsageError(f"{device!r} is no device to serve on", fix="give cpu, cuda, or one GPU as cuda:1")
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    if dtype not in _ITEM_BYTES:
        raise UsageError(f"{dtype!r} is no dtype to serve in", fix=f"give one of {', '.join(_ITEM_BYTES)}")
    return device, dtype


def resolve_adapter_dtype(name: str) -> str | None:
    """What EngineConfig calls it; None where adapters are kept as keys and values are. Raises UsageError."""
    if name not in _ADAPTER_DTYPES:
        raise UsageError(f"{name!r} is no dtype of adapters", fix=f"give one of {', '.join(_ADAPTER_DTYPES)}")
    return _ADAPTER_DTYPES[name]


def default_pool_bytes(device: str, weights_bytes: int) -> int:
    """Of the pool on `device`, once the base's weights lie there. Raises UsageError if nothing would be left."""
    if device.startswith("cuda"):
        found, ordinal = gpus(), int(device.partition(":")[2] or 0)
        if ordinal >= len(found):
            raise UsageError(
                f"there is no GPU {device}", cause=f"the driver shows {len(found)}", fix="give --device cpu"
            )
        memory_bytes = found[ordinal].memory_bytes
        share, most = _GPU_POOL_SHARE, memory_bytes
    else:
        memory_bytes, share, most = available_memory_bytes(), _CPU_POOL_SHARE, _MAX_CPU_POOL_BYTES
    left = int(share * (memory_bytes - weights_bytes))
    if left < _MIN_POOL_BYTES:
        raise UsageError(
            f"the base takes {weights_bytes >> 20} MiB of the {memory_bytes >> 20} MiB on {device}, too much",
            fix="use a device with more memory, or another --dtype; --pool SIZE sets the rest by hand",
        )
    return min(left, most)


def host_cache_bytes(asked: int | None, *, is_page_locked: bool, num_loaders: int = 0) -> int:
    """What was asked for, or a share of what is free. Raises UsageError where that could never be had or be enough."""
    if asked is None:
        return min(_MAX_HOST_CACHE_BYTES, int(_HOST_CACHE_SHARE * available_memory_bytes()))
    if asked == 0 and num_loaders:
        raise UsageError(
            f"--host-cache 0 leaves {num_loaders} loader {'process' if num_loaders == 1 else 'processes'} no memory",
            cause="they pack adapters there, and the device takes them from there",
            fix="give --host-cache SIZE, at least what the largest adapter takes; or --loaders 0, which needs none",
        )
    if is_page_locked and asked > (available := available_memory_bytes()):
        raise UsageError(
            f"a host cache of {asked / 2**30:.1f} GiB does not fit into the {available / 2**30:.1f} GiB that are free",
            cause="for a GPU's loaders it is page-locked, so all of it is taken at the start",
            fix="give it less: --host-cache SIZE",
        )
    return asked


def weights_bytes(folder: Path, dtype: str) -> int:
    """Of the base in the dtype that it is served in."""
    from flora.checkpoint import open_checkpoint

    return sum(info.numel for info in open_checkpoint(folder).tensors.values()) * _ITEM_BYTES[dtype]
