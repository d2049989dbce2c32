"""Where an adapter lies in the pool: arithmetic that every process repeats with the same result."""

from itertools import pairwise

import msgspec
import numpy as np
import pytest

from flora.adapter import AdapterHeader, BaseBinding, ChangeReport, ExactTensor, Module, Recipe, TensorChange
from flora.errors import ShapeMismatch, Unsupported
from flora.kernels import CHUNK, MODULES, padded, row_alignment
from flora.serve.engine.layout import PoolGeometry, adapter_layout, stream_alignment
from flora.serve.engine.model.config import ModelConfig, parse_model_config
from tests.serve.engine.adapters import module_name, random_adapter

LLAMA_8B = PoolGeometry(num_planes=32, num_pages=1000, page_tokens=16, num_kv_heads=8, head_dim=128, itemsize=2)


@pytest.fixture
def config() -> ModelConfig:
    """Two layers; q [80, 100], k and v [40, 100], o [100, 80], gate and up [130, 100], down [100, 130]."""
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


def header_of(*modules: Module) -> AdapterHeader:
    return AdapterHeader(base=BaseBinding(name="b", base_id=None), modules=modules, recipe=Recipe(operation="import"))


def module(name: str, in_features: int, out_features: int, rank: int = 3, alpha: float = 6.0) -> Module:
    return Module(
        name=name,
        in_features=in_features,
        out_features=out_features,
        rank=rank,
        alpha=alpha,
        dtype="float32",
        a_sha256="",
        b_sha256="",
    )


def test_a_page_of_an_8b_model_in_bfloat16_takes_64_kib_in_each_plane():
    assert LLAMA_8B.cell_elements == 2 * 16 * 8 * 128 == 32768
    assert LLAMA_8B.page_bytes == 32 * 65536


def test_a_cell_is_whole_chunks_even_where_keys_and_values_are_not():
    geometry = PoolGeometry(num_planes=2, num_pages=9, page_tokens=1, num_kv_heads=1, head_dim=20, itemsize=4)

    assert geometry.kv_elements == 40
    assert geometry.cell_elements == 64


def test_counts_are_rounded_up():
    assert [LLAMA_8B.pages_for_tokens(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    assert [LLAMA_8B.cells_for_elements(n) for n in (0, 1, 32768, 32769)] == [0, 1, 1, 2]
    assert [LLAMA_8B.pages_for_elements(32768 * n) for n in (32, 33)] == [1, 2]


def test_a_stream_goes_plane_by_plane_through_each_page():
    geometry = PoolGeometry(num_planes=3, num_pages=10, page_tokens=1, num_kv_heads=1, head_dim=32, itemsize=4)

    assert geometry.cell_ids([7, 2], num_cells=5).tolist() == [7, 17, 27, 2, 12]


def test_a_layers_a_factors_lie_together_and_then_its_b_factors(config):
    header = header_of(
        module(module_name(0, "v"), 100, 40, rank=1),
        module(module_name(0, "q"), 100, 80, rank=3, alpha=6.0),
        module(module_name(1, "down"), 130, 100, rank=2),
    )

    layout = adapter_layout(config, header)

    # Rows of 100 and 80 elements take two chunks of 64, rows of 40 one, rows of 130 three.
    q, v, down = layout.modules
    assert (q.a_chunk, q.b_chunk, q.scale) == (0, 3 * 2 + 1 * 2, 2.0)
    assert (v.a_chunk, v.b_chunk) == (3 * 2, 8 + 3 * 2)
    assert (down.a_chunk, down.b_chunk) == (15, 15 + 2 * 3)
    assert layout.num_elements == (15 + 2 * 3 + 2 * 2) * CHUNK


def test_an_adapters_table_has_a_record_for_every_place_and_rank_zero_where_nothing_is(config):
    header = header_of(
        module(module_name(0, "q"), 100, 80, rank=3, alpha=6.0), module(module_name(1, "down"), 130, 100)
    )
    layout = adapter_layout(config, header)

    table = layout.table()

    records = np.frombuffer(table.records, np.int32).reshape(config.num_layers, len(MODULES), 3)
    scales = np.frombuffer(table.scales, np.float32).reshape(config.num_layers, len(MODULES))
    q, down = layout.modules
    assert records[0, MODULES.index("q")].tolist() == [3, q.a_chunk, q.b_chunk]
    assert records[1, MODULES.index("down")].tolist() == [down.rank, down.a_chunk, down.b_chunk]
    assert scales[0, MODULES.index("q")] == 2.0
    assert np.count_nonzero(records[:, :, 0]) == np.count_nonzero(scales) == 2
    assert (table.max_rank, table.num_elements) == (3, layout.num_elements)


def test_the_order_of_the_header_does_not_matter(config):
    modules = random_adapter(config, seed=1).header.modules

    assert adapter_layout(config, header_of(*modules)) == adapter_layout(config, header_of(*reversed(modules)))


@pytest.mark.parametrize("seed", range(5))
def test_no_two_factors_overlap_and_nothing_lies_past_the_end(config, seed):
    layout = adapter_layout(config, random_adapter(config, seed).header)

    taken: set[int] = set()
    for placed in layout.modules:
        a = range(placed.a_chunk, placed.a_chunk + placed.rank * -(-placed.in_features // CHUNK))
        b = range(placed.b_chunk, placed.b_chunk + placed.rank * -(-placed.out_features // CHUNK))
        assert taken.isdisjoint(a)
        assert taken.isdisjoint(b)
        taken |= {*a, *b}
    assert taken == set(range(layout.num_elements // CHUNK))


def test_tensor_parallel_ranks_share_outputs_or_inputs_and_never_the_rank(config):
    header = header_of(*(module(module_name(0, name), *config.module_shape(name)) for name in MODULES))

    shapes = {
        p.name.split(".")[-1]: (p.rank, p.in_features, p.out_features)
        for p in adapter_layout(config, header, 2).modules
    }

    assert shapes == {
        "q_proj": (3, 100, 40),
        "k_proj": (3, 100, 20),
        "v_proj": (3, 100, 20),
        "o_proj": (3, 40, 100),
        "gate_proj": (3, 100, 65),
        "up_proj": (3, 100, 65),
        "down_proj": (3, 65, 100),
    }


@pytest.mark.parametrize(
    "name",
    [
        "lm_head",
        "model.embed_tokens",
        "model.norm",
        "model.layers.0.mlp.experts.0.up_proj",
        "model.layers.00.self_attn.q_proj",
        "layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.q_proj.base",
    ],
)
def test_what_is_no_projection_of_a_layer_is_refused_by_name(config, name):
    with pytest.raises(Unsupported) as caught:
        adapter_layout(config, header_of(module(name, 100, 80)))

    assert caught.value.module == name
    assert name in caught.value.fix


def test_an_embedding_and_whole_tensors_are_refused_with_the_option_that_made_them(config):
    table = msgspec.structs.replace(module("model.embed_tokens", 100, 99), kind="embedding")
    norm = ExactTensor(name="model.norm.weight", shape=(100,), dtype="bfloat16", sha256="")
    whole = msgspec.structs.replace(header_of(module("model.layers.0.self_attn.q_proj", 100, 80)), exact=(norm,))

    with pytest.raises(Unsupported) as caught:
        adapter_layout(config, header_of(table))
    assert caught.value.fix == "extract again without --embeddings"
    with pytest.raises(Unsupported, match=r"1 whole tensors, model\.norm\.weight among them") as caught:
        adapter_layout(config, whole)
    assert caught.value.fix == "extract again without --vectors"


def test_a_refusal_names_its_share_of_the_change(config):
    report = ChangeReport(
        tensors=(
            TensorChange(name="lm_head.weight", shape=(99, 100), status="extracted", norm_squared=1.0),
            TensorChange(
                name="model.layers.0.self_attn.q_proj.weight", shape=(80, 100), status="extracted", norm_squared=3.0
            ),
        )
    )

    with pytest.raises(Unsupported, match=r"lm_head \(25\.0% of the change\)"):
        adapter_layout(config, header_of(module("lm_head", 100, 99)), report=report)


def test_a_module_of_another_shape_is_refused_with_both_shapes(config):
    with pytest.raises(ShapeMismatch, match=r"is \[81, 100\] in the adapter, \[80, 100\] in the base"):
        adapter_layout(config, header_of(module(module_name(0, "q"), 100, 81)))


def test_a_layer_that_the_base_does_not_have_is_refused(config):
    with pytest.raises(ShapeMismatch, match="the base has 2 layers"):
        adapter_layout(config, header_of(module(module_name(2, "q"), 100, 80)))


@pytest.mark.parametrize(
    ("hidden", "ff", "kv_heads", "promised"),
    [(4096, 14336, 8, 2048), (4096, 11008, 32, 2048), (576, 1536, 3, 512), (896, 4864, 2, 256)],
)
def test_what_kernels_are_promised_of_every_stream_to_read_as_much_from_one_cell(hidden, ff, kv_heads, promised):
    head_dim = 128 if hidden == 4096 else 64
    config = parse_model_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": hidden,
            "intermediate_size": ff,
            "num_hidden_layers": 2,
            "num_attention_heads": hidden // head_dim,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "vocab_size": 100,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
        }
    )
    geometry = PoolGeometry(2, 10, page_tokens=16, num_kv_heads=kv_heads, head_dim=head_dim, itemsize=2)
    alignment = stream_alignment(config, geometry)

    for seed in range(5):
        header = random_adapter(config, seed, ranks=(1, 3, 5, 8, 13)).header
        for placed in adapter_layout(config, header, alignment=alignment).modules:
            for chunk, length in ((placed.a_chunk, placed.in_features), (placed.b_chunk, placed.out_features)):
                read = row_alignment(alignment, length)
                starts = [chunk * CHUNK + row * padded(length) for row in range(placed.rank)]
                assert chunk * CHUNK % alignment == 0
                assert not [n for n in (*starts, geometry.cell_elements) if n % read]
    assert alignment == promised


def test_matrices_that_start_on_more_than_a_chunk_overlap_no_other_and_lose_little(config):
    header = random_adapter(config, 3, ranks=(1, 3, 5)).header
    dense, spaced = adapter_layout(config, header), adapter_layout(config, header, alignment=4 * CHUNK)

    taken = sorted(
        (chunk, chunk + placed.rank * padded(length) // CHUNK)
        for placed in spaced.modules
        for chunk, length in ((placed.a_chunk, placed.in_features), (placed.b_chunk, placed.out_features))
    )
    assert all(end <= start for (_, end), (start, _) in pairwise(taken))
    assert taken[-1][1] * CHUNK == spaced.num_elements
    assert dense.num_elements <= spaced.num_elements <= dense.num_elements + 3 * CHUNK * len(taken)
