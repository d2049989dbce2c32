"""The fused kernels between a layer's products, against the plain torch that they stand for."""

import pytest
import torch

from flora.kernels import LowRankTerms, ReferenceOps, fused, pointwise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # an ulp or two of each
EPS = 1e-5
NAN = float("nan")
OVERLAP = DEVICE == "cuda" and torch.cuda.get_device_capability() >= (9, 0)


def draw(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 100, 576])
def test_the_norm_is_the_references(size, dtype):
    x, weight = draw(7, size, dtype=dtype, seed=0), draw(size, dtype=dtype, seed=1)

    torch.testing.assert_close(
        fused.rms_norm(x, weight, EPS, overlap=OVERLAP),
        pointwise.rms_norm(x, weight, EPS),
        rtol=TOLERANCE[dtype],
        atol=TOLERANCE[dtype],
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_before_the_norm_is_kept_in_place(dtype):
    x, delta, weight = (
        draw(5, 100, dtype=dtype, seed=0),
        draw(5, 100, dtype=dtype, seed=1),
        draw(100, dtype=dtype, seed=2),
    )
    total = x + delta

    normed = fused.add_rms_norm(x, delta, weight, EPS, overlap=OVERLAP)

    assert torch.equal(x, total)
    torch.testing.assert_close(
        normed, pointwise.rms_norm(total, weight, EPS), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 1, 16), (14, 2, 48)])
def test_rotated_keys_and_plain_values_land_in_their_slots(q_heads, kv_heads, head_dim, dtype):
    n, pages, page_tokens = 6, 5, 4
    qkv = draw(n, (q_heads + 2 * kv_heads) * head_dim, dtype=dtype, seed=3)
    positions = torch.tensor([0, 1, 9, 30, 7, 2], device=DEVICE)
    slots = torch.tensor([4, 5, 19, -1, 8, 11], device=DEVICE)  # -1 is padding: stored nowhere
    angles = torch.rand(32, head_dim // 2, generator=torch.Generator().manual_seed(4)).to(DEVICE) * 6
    cos, sin = angles.cos(), angles.sin()
    nan = torch.full((pages, 2, page_tokens, kv_heads, head_dim), float("nan"), dtype=dtype, device=DEVICE)
    kv, expected_kv = nan.clone(), nan.clone()

    expected_q = ReferenceOps().rope_store(qkv.clone(), positions, cos, sin, expected_kv, slots)
    q = fused.rope_store(qkv, positions, cos, sin, kv, slots, overlap=OVERLAP)

    torch.testing.assert_close(q, expected_q, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(kv, expected_kv, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True)
    assert torch.equal(kv.isnan(), expected_kv.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gated_activation_is_the_references(dtype):
    gate_up = draw(3, 2 * 1100, dtype=dtype, seed=5)

    torch.testing.assert_close(
        fused.silu_mul(gate_up, overlap=OVERLAP),
        pointwise.silu_mul(gate_up),
        rtol=TOLERANCE[dtype],
        atol=TOLERANCE[dtype],
    )


def terms_of(product: torch.Tensor) -> LowRankTerms:
    """Of every other row; the rows between have no adapter, and NaN lies there."""
    values = draw(*product.shape, dtype=product.dtype, seed=8)
    adapter_rows = torch.arange(len(product), dtype=torch.int32, device=DEVICE) % 2
    values[adapter_rows == 0] = NAN
    return LowRankTerms(values, adapter_rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_terms_are_added_before_the_sum_of_the_norm(dtype):
    x, delta = draw(5, 100, dtype=dtype, seed=0), draw(5, 100, dtype=dtype, seed=1)
    weight = draw(100, dtype=dtype, seed=2)
    terms = terms_of(delta)
    wanted_x = x.clone()
    wanted = fused.add_rms_norm(wanted_x, terms.added_to(delta), weight, EPS, overlap=OVERLAP)

    normed = fused.add_rms_norm(x, delta, weight, EPS, terms, overlap=OVERLAP)

    assert torch.equal(x, wanted_x)
    assert torch.equal(normed, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_terms_are_added_before_the_activation(dtype):
    gate_up = draw(4, 2 * 1100, dtype=dtype, seed=5)
    terms = terms_of(gate_up)

    activated = fused.silu_mul(gate_up, terms, overlap=OVERLAP)

    assert torch.equal(activated, fused.silu_mul(terms.added_to(gate_up), overlap=OVERLAP))


@pytest.mark.parametrize("dtype", DTYPES)
def test_terms_are_added_before_the_rotation_and_reach_the_cache(dtype):
    qkv = draw(6, (9 + 2 * 3) * 48, dtype=dtype, seed=3)
    terms = terms_of(qkv)
    positions = torch.tensor([0, 1, 9, 30, 7, 2], device=DEVICE)
    slots = torch.tensor([4, 5, 19, -1, 8, 11], device=DEVICE)
    angles = torch.rand(32, 24, generator=torch.Generator().manual_seed(4)).to(DEVICE) * 6
    kv, wanted_kv = (torch.zeros(5, 2, 4, 3, 48, dtype=dtype, device=DEVICE) for _ in range(2))
    at = positions, angles.cos(), angles.sin()
    wanted_q = fused.rope_store(terms.added_to(qkv), *at, wanted_kv, slots, overlap=OVERLAP)

    q = fused.rope_store(qkv, *at, kv, slots, terms, overlap=OVERLAP)

    assert torch.equal(q, wanted_q)
    assert torch.equal(kv, wanted_kv)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_without_an_adapter_keeps_its_bits_where_others_have_one(dtype):
    """Many rows: what a compiler fuses differently beside terms shows in few."""
    n, heads, head_dim = (2048, 18, 64) if DEVICE == "cuda" else (16, 6, 16)
    size = heads * head_dim
    x, delta, weight = (draw(n, size, dtype=dtype, seed=seed) for seed in (0, 1, 2))
    terms = LowRankTerms(torch.full_like(delta, NAN), torch.zeros(n, dtype=torch.int32, device=DEVICE))
    positions = torch.arange(n, device=DEVICE)
    angles = torch.rand(n, head_dim // 2, generator=torch.Generator().manual_seed(4)).to(DEVICE) * 6

    def layer(terms: LowRankTerms | None) -> list[torch.Tensor]:
        total, kv = x.clone(), torch.zeros(n, 2, 1, 2, head_dim, dtype=dtype, device=DEVICE)
        normed = fused.add_rms_norm(total, delta, weight[0], EPS, terms, overlap=OVERLAP)
        q = fused.rope_store(
            delta.clone(), positions, angles.cos(), angles.sin(), kv, positions, terms, overlap=OVERLAP
        )
        return [total, normed, q, kv, fused.silu_mul(delta, terms, overlap=OVERLAP)]

    for plain, beside_others in zip(layer(None), layer(terms), strict=True):
        assert torch.equal(plain, beside_others)
