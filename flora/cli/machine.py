"""What this machine has: cores, memory and GPUs, found out without torch."""

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USED = Path("/sys/fs/cgroup/memory.current")
_NAME_BYTES = 100


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    memory_bytes: int


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def available_memory_bytes() -> int:
    """Memory that can still be had: the kernel's estimate, or less where a container has a limit."""
    available = _meminfo_bytes("MemAvailable")
    try:
        limit = int(_CGROUP_LIMIT.read_text())  # "max" where there is none
        return min(available, max(0, limit - int(_CGROUP_USED.read_text())))
    except (OSError, ValueError):
        return available


def gpus() -> list[Gpu]:
    """The GPUs that the CUDA driver shows this process; none where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    return [_gpu(driver, ordinal) for ordinal in range(count.value)]


def _gpu(driver: ctypes.CDLL, ordinal: int) -> Gpu:
    device, size = ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    driver.cuDeviceGet(ctypes.byref(device), ordinal)
    driver.cuDeviceGetName(name, _NAME_BYTES, device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    return Gpu(name.value.decode(errors="replace"), size.value)


def _meminfo_bytes(field: str) -> int:
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_MEMINFO} has no {field}")
