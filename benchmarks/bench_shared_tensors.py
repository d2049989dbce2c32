"""What does it cost a reader that equal tensors of different adapters are stored once, by the size of these tensors?

Siblings of which every other tensor is equal, in two registries: one that keeps each weights file whole, and one that
shares tensors of that size. Each adapter is loaded as a server does it, checked while it is copied: with its files in
memory, and after the system was told to forget them. Results are checked before they are timed. What is measured chose
`flora.registry.cutting.MIN_SHARED_BYTES`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from flora.adapter import Adapter, BaseBinding, Recipe, make_adapter
from flora.lowrank import LowRank
from flora.registry import Registry, Version, cutting

REPOSITORY = Path(__file__).resolve().parent.parent
BASE = BaseBinding(name="org/base", base_id="sha256:" + "b" * 64)
TENSOR_BYTES = [1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24]


def sibling(number: int, tensor_bytes: int, adapter_bytes: int) -> Adapter:
    """An adapter with tensors of that size, those of even place equal in all siblings."""
    exact = {}
    for place in range(adapter_bytes // tensor_bytes):
        seed = place if place % 2 == 0 else 1_000_000 * (number + 1) + place
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(2**15, (tensor_bytes // 2,), generator=generator, dtype=torch.int16)
        exact[f"tensor.{place:05}"] = words.view(torch.bfloat16).nan_to_num()
    factors = {"q_proj": LowRank(A=torch.full((1, 8), float(number)), B=torch.ones(8, 1))}
    return make_adapter(factors, BASE, Recipe(operation="extract"), exact=exact)


def disk_bytes(registry: Registry) -> int:
    return sum(path.stat().st_size for path in (registry.root / "blobs").rglob("*") if path.is_file())


def forget_files(registry: Registry) -> None:
    """Asks the system to drop the store's files from memory."""
    for path in (registry.root / "blobs").rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load_ms(folder: Path, versions: list[Version], *, is_cold: bool, repeats: int) -> float:
    """The median of loading one adapter and copying its tensors; each time by a store that has checked nothing yet."""
    times = []
    for _ in range(repeats):
        for version in versions:
            with Registry.open(folder) as registry:
                if is_cold:
                    forget_files(registry)
                start = time.perf_counter()
                with registry.loading(version) as adapter:
                    for tensor in adapter.exact.values():
                        tensor.clone()
                times.append((time.perf_counter() - start) * 1e3)
                del adapter, tensor
    return statistics.median(times)


def measure(scratch: Path, tensor_bytes: int, adapter_bytes: int, num_siblings: int, repeats: int) -> dict[str, float]:
    record: dict[str, float] = {"tensor_bytes": tensor_bytes}
    folders = {"whole": scratch / f"whole-{tensor_bytes}", "parts": scratch / f"parts-{tensor_bytes}"}
    versions: dict[str, list[Version]] = {}
    for form, folder in folders.items():
        cutting.MIN_SHARED_BYTES = tensor_bytes if form == "parts" else 1 << 62
        with Registry.open(folder) as registry:
            versions[form] = []
            for number in range(num_siblings):
                adapter = sibling(number, tensor_bytes, adapter_bytes)
                start = time.perf_counter()
                versions[form].append(registry.add(adapter, f"sibling-{number}"))
                record[f"{form}_add_ms"] = (time.perf_counter() - start) * 1e3  # of the last one
                loaded = registry.load(versions[form][-1])
                assert all(torch.equal(loaded.exact[name], tensor) for name, tensor in adapter.exact.items())
                del loaded  # what is mapped is not forgotten
            registry.gc(grace_s=0)
            record[f"{form}_disk_bytes"] = disk_bytes(registry)
    assert [each.digest for each in versions["whole"]] == [each.digest for each in versions["parts"]]
    for state in ("warm", "cold"):
        for form in ("whole", "parts", "whole", "parts"):  # the second round counts
            record[f"{form}_{state}_ms"] = load_ms(
                folders[form], versions[form], is_cold=state == "cold", repeats=repeats
            )
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter-mib", type=int, default=64)
    parser.add_argument("--siblings", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a file that the JSON lines are appended to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"], capture_output=True, text=True)
    print(f"{arguments.siblings} siblings of {arguments.adapter_mib} MiB, half of each equal in all; ms to load one\n")
    print(f"{'tensor':>10}{'warm whole':>12}{'in parts':>10}{'cold whole':>12}{'in parts':>10}{'disk':>8}")
    lines = []
    for tensor_bytes in TENSOR_BYTES:
        with tempfile.TemporaryDirectory() as scratch:
            measured = measure(
                Path(scratch), tensor_bytes, arguments.adapter_mib << 20, arguments.siblings, arguments.repeats
            )
        figures = [measured[f"{form}_{state}_ms"] for state in ("warm", "cold") for form in ("whole", "parts")]
        saved = measured["parts_disk_bytes"] / measured["whole_disk_bytes"]
        columns = "".join(f"{value:>{width}.1f}" for value, width in zip(figures, (12, 10, 12, 10), strict=True))
        print(f"{tensor_bytes >> 10:>6} KiB{columns}{saved:>8.0%}")
        record = {
            "benchmark": "shared_tensors",
            "adapter_bytes": arguments.adapter_mib << 20,
            "siblings": arguments.siblings,
            **{name: round(value, 2) for name, value in measured.items()},
            "device": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "commit": commit.stdout.strip(),
            "load_average": round(os.getloadavg()[0], 2),
        }
        lines.append(json.dumps(record))
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
