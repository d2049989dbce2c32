"""The product for --batch-invariant: torch's own value, and a row's bits the same at every number of rows."""

import pytest
import torch
import torch.nn.functional as F

from flora.kernels.row_matmul import row_matmul
from flora.kernels.tuning import MatmulTuning

SMALL = MatmulTuning(block_rows=16, block_outputs=32, block_k=16, band=2, num_stages=2)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of the largest value


def draw(*shape: int, dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


@pytest.mark.parametrize("tuning", [MatmulTuning(), SMALL], ids=["default", "small-tiles"])
@pytest.mark.parametrize(("n", "out_features", "in_features"), [(1, 64, 64), (37, 199, 100), (130, 33, 576)])
def test_it_is_torchs_linear(device, dtype, tuning, n, out_features, in_features):
    x = draw(n, in_features, dtype=dtype, device=device, seed=0)
    weight = draw(out_features, in_features, dtype=dtype, device=device, seed=1)
    bias = draw(out_features, dtype=dtype, device=device, seed=2)

    for added in (None, bias):
        wanted = F.linear(x.double(), weight.double(), None if added is None else added.double())
        worst = (row_matmul(x, weight, added, tuning=tuning).double() - wanted).abs().max()
        assert worst <= TOLERANCE[dtype] * wanted.abs().max(), worst


def test_it_leaves_the_result_where_it_is_told(device, dtype):
    x, weight = (draw(5, 40, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    room = torch.zeros(9, 5, dtype=dtype, device=device)

    result = row_matmul(x, weight, out=room[:5])

    assert result.data_ptr() == room.data_ptr()
    assert torch.equal(result, row_matmul(x, weight))
    assert not room[5:].any()


def test_a_row_keeps_its_bits_at_every_number_of_rows(device, dtype):
    weight = draw(70, 100, dtype=dtype, device=device, seed=1)
    row = draw(1, 100, dtype=dtype, device=device, seed=2)[0]
    alone = row_matmul(row[None], weight, tuning=SMALL)[0]

    for n in (2, 16, 17, 33, 200):
        x = draw(n, 100, dtype=dtype, device=device, seed=n)
        x[n - 2] = float("nan")
        # The interpreter's products are BLAS's: the bits depend on a row's place in its block; on a GPU not.
        for place in {0, n - 1} if device.type == "cuda" else {0}:
            x[place] = row
            assert torch.equal(row_matmul(x, weight, tuning=SMALL)[place], alone), (n, place)
