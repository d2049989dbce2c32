"""How long does `flora extract` take for a whole 8B model on a GPU, and how far is each part of it from its floor?

    python benchmarks/bench_extract_gpu.py --work /dev/shm --out benchmarks/results/extract_gpu.jsonl

A pair of two 16 GB checkpoints is made on the device and lies in --work; all of it has been read when the clock starts.
Each run is the command as a user gives it, in a process of its own with an empty FLORA_HOME: imports, hashing both
checkpoints and storing the adapter included. One JSON line a run, written as it ends, with the command's own account of
its time beside the floors of `extract_floors.py`; then one with what a sample of modules keeps, recomputed in float64
from the files, beside the best that their rank could keep. This process loads no torch: a child's peak memory is at
least its parent's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_extract import REPOSITORY, about_this_machine

NAME = "bench"  # of the adapter, in a registry of its own for each run
SAMPLE = ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama3-8b", help="of big_pair.SHAPES")
    parser.add_argument("--kind", choices=["spiked", "heavy"], default="spiked")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="the pair lies here; default: a temporary folder")
    parser.add_argument("--out", type=Path, help="append the JSON lines here")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)  # what one of our processes is to do
    parser.add_argument("--paths", nargs="+", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        print(json.dumps(TASKS[args.task](args)))
        return
    with tempfile.TemporaryDirectory(dir=args.work) as work, tempfile.TemporaryDirectory() as homes:
        measure(args, Path(work), Path(homes))


def measure(args: argparse.Namespace, pair: Path, homes: Path) -> None:
    """Everything, and the rows of it."""
    about = about_this_machine() | {"bench": "extract-gpu", "shape": args.shape, "kind": args.kind, "rank": args.rank}
    about |= {"seed": args.seed} | told(args, "make", pair)
    floors = {"start": start_s(args.device)} | told(args, "floors", pair, homes)
    tell(f"floors {shown(floors)}")
    for i in range(args.rounds):
        write(args, about | {"label": f"extract/{args.shape}", "round": i} | run(args, pair, homes / str(i), floors))
    row = {"label": f"extract/{args.shape}/kept", "kept": told(args, "check", pair, homes / str(args.rounds - 1))}
    write(args, about | row)


def start_s(device: str) -> float:
    """Of a process that imports torch and touches the device; of two, for the first may have to fetch the libraries."""
    command = [sys.executable, "-c", f"import torch; torch.ones(1, device={device!r}).item()"]
    walls = []
    for _ in range(2):
        start = time.perf_counter()
        subprocess.run(command, check=True)
        walls.append(time.perf_counter() - start)
    return min(walls)


def run(args: argparse.Namespace, pair: Path, home: Path, floors: dict[str, float]) -> dict[str, Any]:
    """One extraction: the process's own figures, and what it said."""
    words = ["extract", pair / "base", pair / "tuned", "--rank", args.rank, "--device", args.device]
    command = [sys.executable, "-m", "flora", *map(str, words), "--name", NAME, "--json"]
    home.mkdir()
    said, log = home / "said.json", home / "log"
    with said.open("wb") as out, log.open("wb") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=errors, env=environment(home))
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - start
    if status:
        sys.exit(f"the command failed:\n{log.read_text()[-3000:]}")
    [told_by_it] = json.loads(said.read_text())["adapters"]
    seconds, num_workers = told_by_it["seconds"], told_by_it["num_workers"]
    parts = parts_of(wall_s, seconds, num_workers, floors)
    tell(f"{wall_s:.2f} s: {shown({name: part['seconds'] for name, part in parts.items()})}")
    keys = ("num_workers", "peak_device_bytes", "num_modules", "num_bytes", "kept_share_of_modules", "kept_share")
    return {
        "wall_s": round(wall_s, 3),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "parts": parts,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "floors": {name: round(value, 4) for name, value in floors.items()},
        **{key: told_by_it[key] for key in keys},
    }


def parts_of(
    wall_s: float, seconds: dict[str, float], num_workers: int, floors: dict[str, float]
) -> dict[str, dict[str, float]]:
    """Seconds of each part, its floor and how many times that it takes.

    By the clock: start and end of the process, plan, work on the tensors, hashes waited for, write. Within work, summed
    over the workers: read, copy, compute. They share one bus and one device, but each reads, so the sum of their
    reading counts against as many floors. The floor of work is the largest of those three.
    """
    compute = seconds["delta"] + seconds["factorize"] + seconds["fit"]
    found = {
        "start": (wall_s - seconds["total"] - seconds["write"], floors["start"]),
        "plan": (seconds["plan"], 0.0),
        "work": (seconds["work"], max(floors[name] for name in ("read", "copy", "compute"))),
        "read": (seconds["read"], num_workers * floors["read"]),
        "copy": (seconds["copy"], floors["copy"]),
        "compute": (compute, floors["compute"]),
        "hashes": (seconds["hashes"], 0.0),
        "write": (seconds["finish"] + seconds["write"], floors["write"]),
        "wall": (wall_s, floors["start"] + max(floors["read"], floors["copy"], floors["compute"]) + floors["write"]),
    }
    return {
        name: {"seconds": round(value, 3), "floor": round(floor, 3)}
        | ({"times_floor": round(value / floor, 2)} if floor else {})
        for name, (value, floor) in found.items()
    }


# --- tasks of processes of their own, which load torch ---


def make(args: argparse.Namespace) -> dict[str, Any]:
    """The pair; says on what device and by which torch."""
    import torch
    from big_pair import SHAPES, make_big_pair

    start = time.perf_counter()
    make_big_pair(args.paths[0], SHAPES[args.shape], args.kind, args.seed, args.device)
    tell(f"made in {time.perf_counter() - start:.1f} s")
    is_cuda = torch.device(args.device).type == "cuda"
    return {"gpu": torch.cuda.get_device_name(args.device) if is_cuda else None, "cuda": torch.version.cuda}


def floors(args: argparse.Namespace) -> dict[str, float]:
    from extract_floors import measure_floors

    return measure_floors(args.paths[0], args.rank, args.device, args.paths[1])


def check(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Of one module of each kind in SAMPLE: energy certified, recomputed, and the best of that rank. In float64."""
    import torch

    from flora.checkpoint import open_checkpoint
    from flora.registry import Registry

    pair, home = args.paths
    base, tuned = open_checkpoint(pair / "base"), open_checkpoint(pair / "tuned")
    found = {}
    with Registry.open(home / "registry") as registry:
        adapter = registry.load(registry.resolve(NAME))
        assert adapter.report is not None
        changes = adapter.report.by_name()
        for leaf in SAMPLE:
            module = [name for name in sorted(adapter.factors) if name.endswith(leaf)][-1]
            factors, change = adapter.factors[module], changes[f"{module}.weight"]
            D, before = (side.load(f"{module}.weight").to(args.device).double() for side in (tuned, base))
            D -= before
            BA = factors.scale * (factors.B.to(args.device).double() @ factors.A.to(args.device).double())
            norm = float(D.square().sum())
            wide = D if D.shape[0] <= D.shape[1] else D.T
            best = float(torch.linalg.eigvalsh(wide @ wide.T)[-factors.rank :].sum())
            found[module] = {
                "certified": change.kept / change.norm_squared,
                "true": 1 - float((D - BA).square().sum()) / norm,
                "best": best / norm,
            }
            tell(f"{module} keeps {found[module]}")
    return found


TASKS = {"make": make, "floors": floors, "check": check}


def told(args: argparse.Namespace, task: str, *paths: Path) -> Any:
    """What this script says when it does one of its tasks in a process of its own."""
    options = ["--shape", args.shape, "--kind", args.kind, "--device", args.device]
    options += ["--rank", str(args.rank), "--seed", str(args.seed)]
    command = [sys.executable, __file__, *options, "--task", task, "--paths", *map(str, paths)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment(None))
    return json.loads(done.stdout)


def environment(home: Path | None) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    named = {"FLORA_HOME": str(home)} if home else {}
    return dict(os.environ) | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"} | named


def write(args: argparse.Namespace, row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)
    if args.out:
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def shown(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in figures.items())


def tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
