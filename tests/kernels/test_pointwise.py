import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from flora.kernels import rms_norm, rope, silu_mul


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_llamas(dtype):
    norm = LlamaRMSNorm(100, eps=1e-5).to(dtype)
    norm.weight.data = randn(100).to(dtype)
    x = randn(7, 100, seed=1).to(dtype)

    torch.testing.assert_close(rms_norm(x, norm.weight.data, 1e-5), norm(x).detach())


def test_rope_is_llamas():
    config = LlamaConfig(hidden_size=128, num_attention_heads=2, rope_theta=10000.0)
    positions = torch.tensor([0, 1, 5, 1000])
    q = randn(4, 2, 64)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    wanted, _ = apply_rotary_pos_emb(q[None].transpose(1, 2), q[None].transpose(1, 2), cos, sin)

    result = rope(q, cos[0, :, :32], sin[0, :, :32])

    torch.testing.assert_close(result, wanted.transpose(1, 2)[0])


def test_silu_mul_is_torchs_and_stays_finite_at_the_ends():
    gate = torch.tensor([[-200.0, -3.0, 0.0, 3.0, 200.0]])
    up = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])

    result = silu_mul(torch.cat([gate, up], dim=1))

    torch.testing.assert_close(result, torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [100, 576, 4096])
def test_a_row_keeps_its_bits_in_any_company(size, dtype):
    row, weight = randn(size).to(dtype), randn(size, seed=1).to(dtype)
    angle = randn(size // 2, seed=2)
    alone = (
        rms_norm(row[None], weight, 1e-5),
        silu_mul(row[None]),
        rope(row[None, None], angle.cos()[None], angle.sin()[None]),
    )

    for n in (2, 3, 7, 16, 65, 300):
        for place in {0, n // 2, n - 1}:
            x = randn(n, size, seed=n).to(dtype)
            x[(place + 1) % n] = float("nan")
            x[place] = row
            angles = randn(n, size // 2, seed=n)
            angles[place] = angle
            assert torch.equal(rms_norm(x, weight, 1e-5)[place], alone[0][0])
            assert torch.equal(silu_mul(x)[place], alone[1][0])
            assert torch.equal(rope(x[:, None], angles.cos(), angles.sin())[place], alone[2][0])
