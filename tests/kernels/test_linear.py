import pytest
import torch

from flora.kernels import PackedLinear, linear
from flora.kernels.linear import BLOCK_ROWS, PRODUCTS, first_invariant, keeps_rows

SHAPES = [(576, 576), (1536, 576), (100, 63), (7, 896), (896, 4864)]  # (out, in)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("product", PRODUCTS)
def test_every_product_is_the_matrix_product(product, shape):
    weight, bias, x = randn(*shape) / shape[1] ** 0.5, randn(shape[0], seed=1), randn(37, shape[1], seed=2)

    wanted = x.double() @ weight.double().t() + bias.double()

    torch.testing.assert_close(product(x, weight, bias).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_keeps_its_bits_at_every_row_count_and_place(shape):
    weight, bias, row = randn(*shape), randn(shape[0], seed=1), randn(shape[1], seed=2)
    packed = PackedLinear(weight, bias)
    alone, dense_alone = packed(row[None])[0], linear(row[None], weight)[0]

    for n in (2, 3, 4, 15, 16, 17, 63, 64, 65, 128, 200, 513):
        for place in {0, n // 2, n - 1}:
            x = randn(n, shape[1], seed=n)
            x[(place + 1) % n] = float("nan")
            x[place] = row
            assert torch.equal(packed(x)[place], alone), (n, place)
            assert torch.equal(linear(x, weight)[place], dense_alone), (n, place)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_thread_count_changes_no_bit(threads):
    weight, x = randn(576, 896), randn(70, 896, seed=1)
    before, wanted = torch.get_num_threads(), PackedLinear(weight)(x)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(PackedLinear(weight)(x), wanted)
    finally:
        torch.set_num_threads(before)


def test_a_product_that_looks_at_the_row_count_is_passed_over():
    def leaky(x, weight, bias):
        return x @ weight.t() + (1e-7 if len(x) > BLOCK_ROWS else 0.0)

    def missing(x, weight, bias):
        raise RuntimeError("this build has no such operator")

    weight = randn(8, 16)
    safe = PRODUCTS[-1]

    assert not keeps_rows(leaky, weight, 16)
    assert keeps_rows(safe, weight, 16)
    assert first_invariant([leaky, missing, safe], weight) is safe


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype):
    weight, x = randn(48, 100).to(dtype), randn(5, 100, seed=1).to(dtype)

    result = PackedLinear(weight)(x)

    assert result.dtype == dtype
    assert torch.equal(result, PackedLinear(weight.float())(x.float()).to(dtype))


def test_leading_dimensions_and_no_rows_at_all():
    packed = PackedLinear(randn(48, 100))
    x = randn(2, 3, 100, seed=1)

    assert torch.equal(packed(x), packed(x.view(6, 100)).view(2, 3, 48))
    assert packed(randn(0, 100)).shape == (0, 48)
    for product in PRODUCTS[:2]:
        assert product(randn(0, 100), randn(48, 100), None).shape == (0, 48)
