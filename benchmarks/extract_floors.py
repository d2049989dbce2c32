"""What each part of an extraction takes at least on this machine: its bytes or operations at speeds measured here.

start      a process that imports torch and touches the device
read       all files into pinned memory, by as many threads as extraction has workers, which do nothing else
copy       as many bytes from one pinned buffer to the device
compute    the larger of two: what the algorithm reads and writes at the speed of a copy on the device, and its
           float32 operations at the speed of a large product
hashes     sha256 of all files on half of the cores, at one core's speed
write      the adapter's bytes to one file, synced
"""

import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import torch

from flora.checkpoint import TensorInfo, open_checkpoint
from flora.extract import ExtractConfig, ExtractionPlan, plan_extraction
from flora.extract.estimate import count_operations
from flora.extract.factorize import KRYLOV_DEPTH, SAMPLE
from flora.rank import RankRule

PIECE = 16 << 20  # bytes


def measure_floors(pair: Path, rank: int, device: str, scratch: Path) -> dict[str, float]:
    """Seconds of each part, and the speeds that they were computed from, in bytes and operations a second."""
    config = ExtractConfig(RankRule(max_rank=rank), device=device)
    base, tuned = open_checkpoint(pair / "base"), open_checkpoint(pair / "tuned")
    plan = plan_extraction(base, tuned, config)
    infos = [*base.tensors.values(), *tuned.tensors.values()]
    num_bytes = sum(info.num_bytes for info in infos)
    host_s = _read_all(infos, plan.crew.num_workers, device)
    bus, memory, products = _bus_speed(device), _memory_speed(device), _product_speed(device)
    hash_speed = _hash_speed(infos)
    return {
        "read": host_s,
        "copy": num_bytes / bus if device != "cpu" else 0.0,
        "compute": max(_compute_bytes(plan) / memory, _operations(plan, config) / products),
        "hashes": num_bytes / (hash_speed * max(1, (os.cpu_count() or 1) // 2)),
        "write": _write_s(scratch / "floor", plan.factor_bytes),
        "read_speed": num_bytes / host_s,
        "bus_speed": bus,
        "device_memory_speed": memory,
        "float32_speed": products,
        "hash_speed_of_a_core": hash_speed,
    }


def _compute_bytes(plan: ExtractionPlan) -> float:
    """Read and written at least: both sides once, and of a matrix its float32 delta once and at each pass over it."""
    passes = 1 / SAMPLE + 2 * KRYLOV_DEPTH  # a sample to begin with, two a block but for the last's return, one to fit
    matrices = sum(4.0 * pair.matrix_shape[0] * pair.matrix_shape[1] for pair in plan.extractable)
    return plan.read_bytes + (1 + passes) * matrices


def _operations(plan: ExtractionPlan, config: ExtractConfig) -> float:
    return sum(count_operations(pair.matrix_shape, plan.ranks[pair.name], config) for pair in plan.extractable)


def _read_all(infos: list[TensorInfo], num_threads: int, device: str) -> float:
    def read(mine: list[TensorInfo]) -> None:
        buffer = torch.empty(PIECE, dtype=torch.uint8, pin_memory=device != "cpu").numpy().data
        for info in mine:
            with info.file.open("rb", buffering=0) as file:
                for start in range(info.start, info.end, PIECE):
                    os.preadv(file.fileno(), [buffer[: min(PIECE, info.end - start)]], start)

    largest_first = sorted(infos, key=lambda info: -info.num_bytes)
    with ThreadPoolExecutor(num_threads) as pool:
        return _timed(lambda: list(pool.map(read, [largest_first[i::num_threads] for i in range(num_threads)])))


def _bus_speed(device: str) -> float:
    buffer = torch.ones(PIECE, dtype=torch.uint8, pin_memory=device != "cpu")
    there = torch.empty(PIECE, dtype=torch.uint8, device=device)
    return PIECE / _best(lambda: there.copy_(buffer, non_blocking=True), device, repeats=32)


def _memory_speed(device: str) -> float:
    """Of reading and writing together."""
    left = torch.ones(1 << (28 if device != "cpu" else 24), device=device)
    right = torch.empty_like(left)
    return 2 * left.nbytes / _best(lambda: right.copy_(left), device, repeats=8)


def _product_speed(device: str) -> float:
    side = 8192 if device != "cpu" else 1024
    left = torch.randn(side, side, device=device)
    return 2 * side**3 / _best(lambda: left @ left, device, repeats=4)


def _hash_speed(infos: list[TensorInfo]) -> float:
    info = max(infos, key=lambda info: info.num_bytes)
    num_bytes = min(info.num_bytes, 1 << 28)
    with (
        info.file.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view,
        memoryview(view) as whole,
        whole[info.start : info.start + num_bytes] as piece,
    ):
        return num_bytes / min(_timed(lambda: sha256(piece).digest()) for _ in range(2))


def _write_s(path: Path, num_bytes: int) -> float:
    data = os.urandom(1 << 20) * max(1, num_bytes >> 20)

    def write() -> None:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    seconds = _timed(write)
    path.unlink()
    return seconds


def _best(work: Callable[[], object], device: str, repeats: int) -> float:
    """Seconds of one call among `repeats` in a row, the best of three such rows."""
    return min(_timed(lambda: _row(work, device, repeats)) for _ in range(3)) / repeats


def _row(work: Callable[[], object], device: str, repeats: int) -> None:
    for _ in range(repeats):
        work()
    if device != "cpu":
        torch.cuda.synchronize(device)


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
