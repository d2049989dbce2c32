"""An adapter in the device's layout, read back by the rule that kernels follow."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from flora.errors import NotFinite
from flora.kernels import CHUNK
from flora.lowrank import LowRank
from flora.serve.engine.layout import PoolGeometry, adapter_layout
from flora.serve.engine.loading.packing import _transpose, pack_cells
from flora.serve.engine.model.config import ModelConfig, parse_model_config
from tests.serve.engine.adapters import random_adapter

GEOMETRY = PoolGeometry(num_planes=2, num_pages=9, page_tokens=4, num_kv_heads=1, head_dim=24, itemsize=4)


@pytest.fixture
def config() -> ModelConfig:
    return parse_model_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": 2,
            "hidden_size": 100,
            "intermediate_size": 130,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 20,
            "vocab_size": 99,
        }
    )


def packed(config: ModelConfig, adapter, dtype: torch.dtype = torch.float32) -> Tensor:
    layout = adapter_layout(config, adapter.header)
    num_cells = GEOMETRY.cells_for_elements(layout.num_elements)
    cells = torch.full((num_cells, GEOMETRY.cell_elements), float("nan"), dtype=dtype)
    pack_cells(adapter, layout, cells)
    return cells


def test_every_row_lies_where_its_chunk_says(config):
    """Element e of the stream is cell e // cell_elements at e % cell_elements."""
    adapter = random_adapter(config, seed=1)
    cells = packed(config, adapter)

    for placed in adapter_layout(config, adapter.header).modules:
        factors = adapter.factors[placed.name]
        for chunk, rows in ((placed.a_chunk, factors.A), (placed.b_chunk, factors.B.T)):
            for j, row in enumerate(rows):
                start = (chunk + j * -(-len(row) // CHUNK)) * CHUNK
                elements = torch.arange(start, start + len(row))
                found = cells[elements // GEOMETRY.cell_elements, elements % GEOMETRY.cell_elements]
                assert torch.equal(found, row)


def test_nothing_is_written_but_the_factors(config):
    """Padding keeps what the memory held before, NaN here: it is never read."""
    adapter = random_adapter(config, seed=1)

    num_values = sum(f.A.numel() + f.B.numel() for f in adapter.factors.values())
    assert int(packed(config, adapter).isfinite().sum()) == num_values


def test_factors_are_rounded_to_the_pools_dtype(config):
    adapter = random_adapter(config, seed=1)

    expected = packed(config, adapter).bfloat16()
    assert torch.equal(packed(config, adapter, torch.bfloat16).nan_to_num(), expected.nan_to_num())


def test_fp8_factors_are_widened_to_the_pools_dtype(config):
    """Their scale is the module's, which the kernels multiply by."""
    adapter = random_adapter(config, seed=1)
    narrow = {
        name: replace(f, A=f.A.to(torch.float8_e4m3fn), B=f.B.to(torch.float8_e4m3fn))
        for name, f in adapter.factors.items()
    }
    wide = {name: replace(f, A=f.A.bfloat16(), B=f.B.bfloat16()) for name, f in narrow.items()}

    found = packed(config, replace(adapter, factors=narrow), torch.bfloat16)

    assert torch.equal(found.nan_to_num(), packed(config, replace(adapter, factors=wide), torch.bfloat16).nan_to_num())


def test_a_value_too_large_for_the_pools_dtype_is_refused(config):
    adapter = random_adapter(config, seed=1, absent=0.0)
    name = "model.layers.1.mlp.up_proj"
    factors = adapter.factors[name]
    large = LowRank(factors.A * 1e8, factors.B, factors.scale)
    adapter = replace(adapter, factors={**adapter.factors, name: large})

    packed(config, adapter, torch.float32)
    with pytest.raises(NotFinite, match=rf"{name} has NaN or infinite factors as float16"):
        packed(config, adapter, torch.float16)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_no_other_pool_is_advised_where_a_pool_of_fp8_refuses_an_adapter(config, stored):
    """No value is too large for it, so what it refuses is not finite as it is stored, and no pool takes that."""
    adapter = random_adapter(config, seed=1, absent=0.0)
    name = "model.layers.0.self_attn.q_proj"
    factors = adapter.factors[name]
    A, B = factors.A.clone(), factors.B.clone()
    B[2, 0] = float("nan")
    spoilt = LowRank(A.to(stored), B.to(stored), factors.scale)

    with pytest.raises(NotFinite) as refused:
        packed(config, replace(adapter, factors={**adapter.factors, name: spoilt}), torch.float8_e4m3fn)

    told = refused.value
    assert told.what == f"{name} has NaN or infinite factors as {str(stored).removeprefix('torch.')}"
    assert (told.cause, told.fix) == ("training diverged, or the file is damaged", "serve an earlier version")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan"), -float("nan")])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_one_number_that_is_not_finite_is_refused_and_its_module_named(config, dtype, number, factor):
    adapter = random_adapter(config, seed=1, absent=0.0)
    name = "model.layers.0.self_attn.q_proj"
    spoilt = replace(
        adapter.factors[name],
        A=adapter.factors[name].A.to(dtype, copy=True),
        B=adapter.factors[name].B.to(dtype, copy=True),
    )
    getattr(spoilt, factor)[-1, -1] = number
    adapter = replace(adapter, factors={**adapter.factors, name: spoilt})

    with pytest.raises(NotFinite, match=rf"{name} has NaN or infinite factors"):
        packed(config, adapter, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_finite_number_is_taken_as_it_is(config, dtype):
    """The largest, the smallest that are normal and subnormal, and both zeros, bit for bit."""
    adapter = random_adapter(config, seed=1, absent=0.0)
    name = "model.layers.0.self_attn.q_proj"
    told = torch.finfo(dtype)
    numbers = torch.tensor([told.max, told.min, told.tiny, told.smallest_normal / 2, 0.0, -0.0]).to(dtype)
    B = numbers.repeat(1000)[: adapter.factors[name].B.numel()].view_as(adapter.factors[name].B)
    factors = replace(adapter.factors[name], A=adapter.factors[name].A.to(dtype), B=B)
    adapter = replace(adapter, factors={**adapter.factors, name: factors})

    cells = packed(config, adapter, dtype)

    (placed,) = [each for each in adapter_layout(config, adapter.header).modules if each.name == name]
    start, width = placed.b_chunk * CHUNK, -(-placed.out_features // CHUNK) * CHUNK
    found = cells.view(-1)[start : start + placed.rank * width].view(placed.rank, width)[:, : placed.out_features]
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(found.view(integers), B.T.contiguous().view(integers))


def test_a_factor_of_more_rows_than_a_block_is_transposed_whole():
    for rank, out in ((1, 20000), (3, 8191), (64, 257), (300, 130)):
        B = torch.arange(out * rank, dtype=torch.int32).view(out, rank).numpy()
        place = np.zeros((rank, out), dtype=np.int32)

        _transpose(B, place)

        assert np.array_equal(place, B.T)
