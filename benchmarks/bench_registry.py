"""How long do adding, listing and resolving take in a registry of 10,000 adapters, or of 100,000?

    python benchmarks/bench_registry.py [--adapters 100000] [--out benchmarks/results/bench_registry.jsonl]

The adapters go in through one `Registry.add_many`, each under a name of its own, with weights, report and manifest of
its own: three files each, synced. Measured: that import; a whole `flora ls` process, with --limit 50 and without (wall
time, and the CPU time that a busy machine does not stretch as much); inside a process that has the registry open
`resolve`, a page from the middle of the listing, one addition, and loading one adapter. Beside it the plain way: a
folder of PEFT folders, whose adapter_config.json a bare Python process opens one by one. Results are checked before
they are timed.
"""

import argparse
import json
import os
import platform
import random
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import sqlalchemy
import torch

from flora.adapter import Adapter, BaseBinding, Recipe, describe, make_adapter, report_of_factors
from flora.lowrank import LowRank, norm_squared
from flora.registry import Registry

REPOSITORY = Path(__file__).resolve().parent.parent
BASE = BaseBinding(name="org/base", base_id="sha256:" + "b" * 64)
MODULES = [f"model.layers.{layer}.self_attn.{kind}_proj" for layer in range(4) for kind in "qkvo"]
SCAN = """
import json, sys
from pathlib import Path
for folder in sorted(Path(sys.argv[1]).iterdir()):
    config = json.loads((folder / "adapter_config.json").read_bytes())
    print(folder.name, config["r"], config["base_model_name_or_path"], sep="\\t")
"""


class Maker:
    """Small adapters of 16 modules, each with weights and a report of its own, made faster than they are stored."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._factors = {
            name: LowRank(
                A=torch.randn(2, 64, generator=generator).bfloat16(),
                B=torch.randn(64, 2, generator=generator).bfloat16(),
            )
            for name in sorted(MODULES)
        }
        report = report_of_factors(self._factors)
        self._template = make_adapter(self._factors, BASE, Recipe(operation="extract"), report)

    def __call__(self, number: int) -> Adapter:
        """The template with the digits of `number` in one row of its first module, and described anew."""
        header, report = self._template.header, self._template.report
        assert report is not None
        first = header.modules[0].name
        A = self._factors[first].A.clone()
        A[0, :8] = torch.tensor([int(digit) for digit in f"{number:08}"])
        factors = LowRank(A=A, B=self._factors[first].B)
        norm = norm_squared(factors)
        change = msgspec.structs.replace(report.tensors[0], norm_squared=norm, kept=norm)
        return Adapter(
            header=msgspec.structs.replace(header, modules=(describe(first, factors), *header.modules[1:])),
            factors=self._factors | {first: factors},
            report=msgspec.structs.replace(report, tensors=(change, *report.tensors[1:])),
        )


def name_of(number: int) -> str:
    return f"team-{number % 40:02}/adapter-{number:05}"


def median_ms(action: Callable[[], object], repeats: int) -> float:
    """The median of the action's wall times, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        action()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[1:])


def median_cpu_ms(action: Callable[[], object], repeats: int) -> float:
    """The median of the CPU time that the processes started by `action` take, user and system."""
    times = []
    for _ in range(repeats + 1):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        action()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append((after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime) * 1e3)
    return statistics.median(times[1:])


def run_ls(folder: Path, *options: str) -> list[str]:
    """The names that `flora ls` prints."""
    command = [sys.executable, "-m", "flora", "ls", "--registry", str(folder), *options]
    lines = _run(command).splitlines()
    return [line.split("\t")[0] for line in lines[1:]]


def run_scan(folder: Path) -> list[str]:
    return _run([sys.executable, "-c", SCAN, str(folder)]).splitlines()


def _run(command: list[str]) -> str:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def measure(scratch: Path, num_adapters: int, seed: int) -> dict[str, float]:
    folder, plain = scratch / "registry", scratch / "plain"
    for number in range(num_adapters):
        path = plain / name_of(number).replace("/", "--")
        path.mkdir(parents=True)
        (path / "adapter_config.json").write_text(json.dumps({"r": 2, "base_model_name_or_path": BASE.name}))

    make = Maker(seed)
    start = time.perf_counter()
    for number in range(1000):
        make(number)
    make_ms = time.perf_counter() - start
    with Registry.open(folder) as registry:
        start, start_cpu = time.perf_counter(), time.process_time()
        versions = registry.add_many((make(number), name_of(number)) for number in range(num_adapters))
        add_s, add_cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
        assert len({version.digest for version in versions}) == num_adapters
        del versions

        refs = [name_of(number) for number in random.Random(seed).sample(range(num_adapters), min(2000, num_adapters))]
        assert all(registry.resolve(ref).ref == f"{ref}@v1" for ref in refs)
        resolve_ms = []
        for ref in refs:
            start = time.perf_counter()
            registry.resolve(ref)
            resolve_ms.append((time.perf_counter() - start) * 1e3)
        everything = sorted(map(name_of, range(num_adapters)))
        middle = everything[num_adapters // 2 - 1]
        page = [entry.name for entry in registry.names(limit=50, after=middle)]
        assert page == everything[num_adapters // 2 :][:50]
        page_ms = median_ms(lambda: registry.names(limit=50, after=middle), repeats=20)
        late = iter([make(num_adapters + extra) for extra in range(21)])
        add_one_ms = median_ms(lambda: registry.add(next(late), "late"), repeats=20)
        registry.remove("late", force=True)
        load_ms = median_ms(lambda: registry.load(registry.resolve(refs[0])), repeats=20)

    repeats = 9 if num_adapters <= 10_000 else 3  # of whole processes
    assert run_ls(folder) == everything
    assert run_ls(folder, "--limit", "50") == everything[:50]
    assert len(run_scan(plain)) == num_adapters
    return {
        "make_ms_each": make_ms,
        "add_ms_each": add_s / num_adapters * 1e3,
        "add_cpu_ms_each": add_cpu_s / num_adapters * 1e3,
        "resolve_p50_ms": statistics.median(resolve_ms),
        "resolve_p99_ms": statistics.quantiles(resolve_ms, n=100)[98],
        "page_ms": page_ms,
        "add_one_ms": add_one_ms,
        "load_ms": load_ms,
        "ls_50_ms": median_ms(lambda: run_ls(folder, "--limit", "50"), repeats=repeats),
        "ls_50_cpu_ms": median_cpu_ms(lambda: run_ls(folder, "--limit", "50"), repeats=repeats),
        "ls_ms": median_ms(lambda: run_ls(folder), repeats=repeats),
        "ls_cpu_ms": median_cpu_ms(lambda: run_ls(folder), repeats=repeats),
        "scan_ms": median_ms(lambda: run_scan(plain), repeats=repeats),
        "index_bytes": (folder / "index.sqlite").stat().st_size,
    }


def print_table(record: dict) -> None:
    rows = [
        ("add, in bulk", record["add_ms_each"], ""),
        ("  its CPU time", record["add_cpu_ms_each"], ""),
        ("  of it making the adapter", record["make_ms_each"], ""),
        ("add one", record["add_one_ms"], "20"),
        ("list a page of 50", record["page_ms"], "100"),
        ("resolve, median", record["resolve_p50_ms"], "1"),
        ("resolve, 99 of 100", record["resolve_p99_ms"], ""),
        ("load one adapter", record["load_ms"], ""),
        ("flora ls --limit 50, the process", record["ls_50_ms"], "500"),
        ("  its CPU time", record["ls_50_cpu_ms"], ""),
        ("flora ls, the process", record["ls_ms"], "500"),
        ("  its CPU time", record["ls_cpu_ms"], ""),
        ("scan of plain folders", record["scan_ms"], ""),
    ]
    print(f"{record['num_adapters']} adapters, index of {record['index_bytes'] / 1e6:.1f} MB\n")
    print(f"{'':34}{'ms':>10}{'aim':>8}")
    for label, value, aim in rows:
        print(f"{label:34}{value:>10.2f}{aim:>8}")
    print()


def about_this_run() -> dict:
    git = ["git", "-C", str(REPOSITORY)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            "sqlalchemy": sqlalchemy.__version__,
        },
        "commit": commit,
        "load_average": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a file that the JSON line is appended to")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        measured = measure(Path(scratch), arguments.adapters, arguments.seed)
    record = {
        "benchmark": "registry",
        "num_adapters": arguments.adapters,
        "seed": arguments.seed,
        **{name: round(value, 3) for name, value in measured.items()},
        **about_this_run(),
    }
    print_table(record)
    line = json.dumps(record)
    print(line)
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
