"""The product of one row: torch's own value, at every shape, and where it was told to leave it."""

import pytest
import torch
import torch.nn.functional as F

from flora.kernels.one_row import one_row_matmul
from flora.kernels.tuning import OneRowTuning, can_overlap

SMALL = OneRowTuning(block_elements=64, num_warps=1)  # many blocks of a row, many programs
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of the largest value


def draw(*shape: int, dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def overlaps(device: torch.device) -> bool:
    return device.type == "cuda" and can_overlap(device)


@pytest.mark.parametrize("tuning", [OneRowTuning(), SMALL], ids=["default", "small-blocks"])
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 64), (199, 100), (33, 576), (5, 4100), (7, 9)])
def test_it_is_torchs_linear(device, dtype, tuning, out_features, in_features):
    x = draw(1, in_features, dtype=dtype, device=device, seed=0)
    weight = draw(out_features, in_features, dtype=dtype, device=device, seed=1)
    bias = draw(out_features, dtype=dtype, device=device, seed=2)

    for added in (None, bias):
        wanted = F.linear(x.double(), weight.double(), None if added is None else added.double())
        result = one_row_matmul(x, weight, added, tuning=tuning, overlap=overlaps(device))
        worst = (result.double() - wanted).abs().max()
        assert worst <= TOLERANCE[dtype] * wanted.abs().max(), worst


def test_it_reads_nothing_beyond_the_weight(device, dtype):
    room = torch.full((30, 100), float("nan"), dtype=dtype, device=device)
    weight = room[3:20]
    weight.copy_(draw(17, 100, dtype=dtype, device=device, seed=1))
    wide = torch.full((1, 164), float("nan"), dtype=dtype, device=device)
    x = wide[:, 64:]
    x.copy_(draw(1, 100, dtype=dtype, device=device, seed=2))

    for tuning in (OneRowTuning(), SMALL):
        assert one_row_matmul(x, weight, tuning=tuning).isfinite().all()


def test_it_leaves_the_result_where_it_is_told(device, dtype):
    x, weight = draw(1, 40, dtype=dtype, device=device, seed=0), draw(5, 40, dtype=dtype, device=device, seed=1)
    room = torch.zeros(3, 5, dtype=dtype, device=device)

    result = one_row_matmul(x, weight, out=room[1:2])

    assert result.data_ptr() == room[1:2].data_ptr()
    assert torch.equal(result, one_row_matmul(x, weight))
    assert not room[0].any()
    assert not room[2].any()


def test_a_chain_of_launches_hands_each_result_on(device, dtype):
    """Each launch may start before the one before it has ended, and still reads what that one wrote."""
    weights = [draw(300, 300, dtype=dtype, device=device, seed=seed) / 17 for seed in range(12)]
    x = wanted = draw(1, 300, dtype=dtype, device=device, seed=99)
    for weight in weights:
        x = one_row_matmul(x, weight, overlap=overlaps(device))
        wanted = F.linear(wanted.double(), weight.double()).to(dtype)

    assert (x.double() - wanted.double()).abs().max() <= 4 * TOLERANCE[dtype] * wanted.double().abs().max()
