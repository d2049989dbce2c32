"""The road by which tensors reach a GPU, here with the CPU at its end: the same bytes, and the same adapter."""

from dataclasses import replace
from threading import local

import pytest
import torch
from safetensors.torch import save_file

from flora.checkpoint import open_checkpoint
from flora.errors import CheckpointError
from flora.extract import ExtractConfig, plan_extraction
from flora.extract.change import PairWorker
from flora.extract.staging import DTYPES, Staging
from flora.extract.station import Station
from flora.extract.stopwatch import STAGES, Stopwatch
from flora.extract.workers import GPU_WORKERS, choose_gpu_crew
from flora.rank import RankRule

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tmp_path):
    """A tensor of each dtype, an empty one, a number and one that no buffer's size divides."""
    generator = torch.Generator().manual_seed(0)
    numbers = 100 * torch.randn(7, 9, generator=generator)
    tensors = {name: numbers.to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"empty": torch.empty(0, 4), "number": torch.tensor(3.0), "long": torch.randn(1001, generator=generator)}
    save_file(tensors, tmp_path / "model.safetensors")
    return open_checkpoint(tmp_path)


@pytest.mark.parametrize("buffer_bytes", [64, 1 << 20])
def test_a_staged_tensor_is_the_mapped_one(checkpoint, buffer_bytes):
    staging = Staging(CPU, Stopwatch(CPU), buffer_bytes)

    for name, info in checkpoint.tensors.items():
        staged, mapped = staging.bring(info), checkpoint.load(name)
        assert staged.dtype == mapped.dtype
        assert torch.equal(staged, mapped)


def test_a_file_cut_while_it_is_open_is_an_error_that_names_the_tensor(checkpoint):
    info = checkpoint.tensors["long"]

    with pytest.raises(CheckpointError, match=r"tensor long of .* cannot be read"):
        Staging(CPU, Stopwatch(CPU)).bring(replace(info, start=info.file.stat().st_size, end=info.end + info.num_bytes))


def test_a_worker_whose_files_are_staged_finds_the_change_that_mapped_files_show(pair):
    config = ExtractConfig(RankRule(max_rank=4))
    plan, threads = plan_extraction(*pair, config), local()
    threads.station = Station("cpu", is_staged=True)
    mapped, staged = PairWorker(*pair, plan.ranks, config), PairWorker(*pair, plan.ranks, config, threads)

    for one in plan.pairs:
        there, here = staged(one), mapped(one)
        assert there.norm_squared == here.norm_squared
        if here.fit:
            assert torch.equal(there.fit.factors.A, here.fit.factors.A)
            assert torch.equal(there.fit.factors.B, here.fit.factors.B)
            assert set(there.seconds) == set(STAGES)
            assert set(here.seconds) == set(STAGES) - {"copy"}


def test_stages_add_up_until_they_are_taken():
    stopwatch = Stopwatch(CPU)
    for _ in range(2):
        with stopwatch.by_clock("read"), stopwatch.on_device("delta"):
            torch.randn(100, 100)

    first = stopwatch.take()

    assert first["read"] >= first["delta"] > 0
    assert stopwatch.take() == {}


def test_workers_of_a_gpu_are_as_many_as_its_memory_holds():
    assert choose_gpu_crew(largest_bytes=1 << 30, free_bytes=1 << 29).num_workers == 1
    assert 1 <= choose_gpu_crew(largest_bytes=1, free_bytes=1 << 36).num_workers <= GPU_WORKERS
