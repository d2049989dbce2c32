"""The benchmark of extraction from a large pair, on a small one and a CPU: the same road, and nothing of its speed."""

import argparse
import importlib
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from flora.checkpoint import open_checkpoint

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PARTS = {"start", "plan", "work", "read", "copy", "compute", "hashes", "write", "wall"}


@pytest.fixture
def bench(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench_extract_gpu")


def test_a_run_says_what_each_part_took_beside_its_floor_and_what_the_adapter_truly_keeps(bench, tmp_path):
    args = argparse.Namespace(shape="tiny", kind="spiked", device="cpu", rank=16, seed=0, paths=[tmp_path, tmp_path])
    bench.make(args)
    floors = {"start": 1.0} | bench.floors(args)

    row = bench.run(args, tmp_path, tmp_path / "home", floors)
    kept = bench.check(argparse.Namespace(device="cpu", paths=[tmp_path, tmp_path / "home"]))

    assert set(row["parts"]) == PARTS
    assert row["wall_s"] > row["seconds"]["total"] > 0
    assert all(value > 0 for name, value in floors.items() if name != "copy")
    assert row["parts"]["read"]["floor"] == pytest.approx(row["num_workers"] * floors["read"], abs=1e-3)
    assert row["num_modules"] == 14
    for shares in kept.values():
        assert shares["certified"] == pytest.approx(shares["true"], abs=1e-6)
        assert shares["best"] - shares["true"] < 3e-4


def test_the_pair_lies_in_shards_whose_tensors_are_all_there_and_come_again_from_their_seed(bench, tmp_path):
    big_pair = importlib.import_module("big_pair")
    shape = big_pair.SHAPES["tiny"]
    for place in ("one", "two"):
        big_pair.make_big_pair(tmp_path / place, shape, "heavy", 7, "cpu")

    one, two = (open_checkpoint(tmp_path / place / "tuned") for place in ("one", "two"))

    assert len({info.file for info in one.tensors.values()}) > 1
    assert len(one.tensors) == 7 * shape.num_layers + 2 * shape.num_layers + 3
    assert one.num_bytes == 2 * sum(math.prod(info.shape) for info in one.tensors.values())
    assert all(torch.equal(one.load(name), two.load(name)) for name in one.tensors)
