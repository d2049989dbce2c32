"""An adapter in the device's layout, read back by the rule that kernels follow."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flora.errors import NotFinite
from flora.kernels import CHUNK
from flora.lowrank import LowRank
from flora.serve.engine.layout import PoolGeometry, adapter_layout
from flora.serve.engine.loading.packing import pack_cells
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
