"""What the scripts of `benchmarks/` ask and tell alike: device, commit, where rows go, and an engine's sizes in GiB."""

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from flora.bench.facts import Surroundings
from flora.bench.row import commit_of_this_code
from flora.serve.config import EngineConfig


def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser of --device, --out and --commit, described by the first line of the script's docstring."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="where there is no git")
    return parser


def ints(text: str) -> tuple[int, ...]:
    """`5,100` -> (5, 100). Raises ValueError, which argparse tells."""
    return tuple(int(part) for part in text.split(","))


def surroundings(args: argparse.Namespace) -> Surroundings:
    """The GPU behind --device, and the commit: --commit, FLORA_COMMIT, or what git says of this code."""
    gpu = torch.cuda.get_device_name(args.device) if args.device != "cpu" else None
    return Surroundings(args.commit or os.environ.get("FLORA_COMMIT") or commit_of_this_code(), gpu)


def place_facts(where: Surroundings) -> dict[str, Any]:
    """Where a row was measured: its columns gpu, torch and commit."""
    return {"gpu": where.gpu, "torch": str(torch.__version__), "commit": where.commit}


def sized_engine(
    device: str,
    pool_gib: float,
    host_gib: float,
    *,
    base: Path = Path(),
    registry: str = "",
    cache_dir: Path = Path(),
    **fields: Any,
) -> EngineConfig:
    """An engine in the device's usual dtype, with sizes in GiB; `flora.bench` names the folders where nobody does."""
    return EngineConfig(
        base=base,
        registry=registry,
        cache_dir=cache_dir,
        device=device,
        dtype="float32" if device == "cpu" else "bfloat16",
        pool_bytes=int(pool_gib * 2**30),
        host_cache_bytes=int(host_gib * 2**30),
        **fields,
    )
