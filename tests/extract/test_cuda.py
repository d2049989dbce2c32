"""The same extraction on a GPU, judged as on the CPU."""

import pytest
import torch

from flora.extract import ExtractConfig, extract
from flora.extract.factorize import factorize
from flora.extract.staging import Staging
from flora.extract.stopwatch import STAGES, Stopwatch
from flora.rank import RankRule
from tests.extract.models import best_share, delta_of, residual_share
from tests.extract.test_factorize import held_share, matrix

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("rule", [RankRule(max_rank=8), RankRule(energy=0.9), RankRule(budget_bytes=40_000)])
def test_a_gpu_keeps_what_the_cpu_keeps(pair, rule):
    on_cpu = extract(*pair, ExtractConfig(rule)).adapter
    on_gpu = extract(*pair, ExtractConfig(rule, device="cuda")).adapter

    assert on_gpu.report.kept_share == pytest.approx(on_cpu.report.kept_share, abs=3e-4)
    assert on_gpu.report.norm_squared == pytest.approx(on_cpu.report.norm_squared, rel=1e-6)
    for module, factors in on_gpu.factors.items():
        delta, change = delta_of(*pair, f"{module}.weight"), on_gpu.report.by_name()[f"{module}.weight"]
        direct = 1 - residual_share(delta, factors)
        assert best_share(delta, factors.rank) - direct < 3e-4
        assert change.kept / change.norm_squared == pytest.approx(direct, rel=1e-6)


def test_two_runs_on_a_gpu_give_the_same_digest(pair):
    config = ExtractConfig(RankRule(max_rank=8), device="cuda")

    assert extract(*pair, config).adapter.header == extract(*pair, config).adapter.header


@pytest.mark.parametrize(("rank", "planted"), [(32, None), (32, 16)])
def test_krylov_on_a_gpu(rank, planted):
    """The planted case exhausts the space: Cholesky meets dependent rows there."""
    D = matrix((400, 500), decay=0.5, rank=planted)
    norm_squared = float(D.double().square().sum())

    basis = factorize(D.cuda(), norm_squared, max_rank=rank, energy=None, exact=False, seed="0")

    assert best_share(D.double().numpy(), rank) - held_share(D, basis.vectors.cpu()) < 3e-4


def test_a_tensor_larger_than_its_pinned_buffers_arrives_whole(pair):
    """Each buffer is filled again only when what it held is on the device."""
    device = torch.device("cuda")
    staging = Staging(device, Stopwatch(device), buffer_bytes=1000)

    for side in pair:
        for name, info in side.tensors.items():
            assert torch.equal(staging.bring(info).cpu(), side.load(name))


def test_each_stage_on_a_gpu_is_timed_by_events(pair):
    timings = extract(*pair, ExtractConfig(RankRule(max_rank=8), device="cuda")).timings

    assert all(timings[stage] > 0 for stage in STAGES)


def test_the_number_of_workers_changes_no_bit(pair, monkeypatch):
    config = ExtractConfig(RankRule(max_rank=8), device="cuda")
    several = extract(*pair, config)
    monkeypatch.setattr("flora.extract.workers.GPU_WORKERS", 1)

    one = extract(*pair, config)

    assert one.plan.crew.num_workers == 1
    assert one.adapter.header == several.adapter.header
