"""Exporters and the compatibility table: the real readers judge where there are any."""

import json

import gguf
import pytest
import torch
from safetensors.torch import load_file

from flora.adapter import Adapter, BaseBinding, Recipe, make_adapter
from flora.errors import Unsupported
from flora.forms import Form
from flora.lowrank import LowRank
from flora.registry.formats.compat import judge
from flora.registry.formats.gguf import save_gguf
from flora.registry.formats.image import save_diffusers, save_kohya
from flora.registry.formats.mlx import save_mlx
from tests.registry.adapters import BASE, HIDDEN, Q_PROJ, UP_PROJ, random_adapter

K_PROJ = "model.layers.0.self_attn.k_proj"
HEADS, KV_HEADS = 4, 2


@pytest.fixture
def llama(tmp_path):
    def write(kind: str = "llama"):
        config = {"model_type": kind, "num_hidden_layers": 2, "num_attention_heads": HEADS}
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config | {"num_key_value_heads": KV_HEADS}))
        return path

    return write


def delta(adapter: Adapter, module: str) -> torch.Tensor:
    factors = adapter.factors[module]
    return factors.scale * factors.B.float() @ factors.A.float()


def read_gguf(path) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: torch.tensor(tensor.data.astype("float32")) for tensor in reader.tensors}


def rotary_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of a q or k weight's rows, row by row: of each head, i and i + half side by side."""
    size = weight.shape[0] // heads
    order = [head * size + i + part * size // 2 for head in range(heads) for i in range(size // 2) for part in (0, 1)]
    return weight[order]


# GGUF


def test_gguf_has_what_llama_cpp_computes_with(llama, tmp_path):
    """alpha over a tensor's own rank is llama.cpp's scale; q and k have their rows in its order."""
    adapter = random_adapter(ranks={Q_PROJ: 4, K_PROJ: 2, UP_PROJ: 3}, scale=2.0)

    save_gguf(adapter, tmp_path / "a.gguf", llama())

    fields, tensors = read_gguf(tmp_path / "a.gguf")
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    for module, name, heads in ((Q_PROJ, "blk.0.attn_q", HEADS), (K_PROJ, "blk.0.attn_k", KV_HEADS)):
        A, B = tensors[f"{name}.weight.lora_a"], tensors[f"{name}.weight.lora_b"]
        scale = fields["adapter.lora.alpha"] / A.shape[0]
        torch.testing.assert_close(scale * B @ A, rotary_pairs(delta(adapter, module), heads))
    up = tensors["blk.1.ffn_up.weight.lora_b"] @ tensors["blk.1.ffn_up.weight.lora_a"]
    torch.testing.assert_close(up, delta(adapter, UP_PROJ))


def test_gguf_keeps_the_rows_of_architectures_that_are_no_llama(llama, tmp_path):
    adapter = random_adapter(ranks={Q_PROJ: 4})

    save_gguf(adapter, tmp_path / "a.gguf", llama("qwen2"))

    fields, tensors = read_gguf(tmp_path / "a.gguf")
    assert fields["general.architecture"] == "qwen2"
    product = tensors["blk.0.attn_q.weight.lora_b"] @ tensors["blk.0.attn_q.weight.lora_a"]
    torch.testing.assert_close(product, delta(adapter, Q_PROJ))


def test_gguf_refuses_what_llama_cpp_cannot_apply(llama, tmp_path):
    with pytest.raises(Unsupported, match="model_type 'mamba'"):
        save_gguf(random_adapter(), tmp_path / "a.gguf", llama("mamba"))
    with pytest.raises(Unsupported, match="embedding"):
        save_gguf(with_embedding(), tmp_path / "a.gguf", llama())


def with_embedding() -> Adapter:
    factors = {"model.embed_tokens": LowRank(A=torch.ones(2, HIDDEN), B=torch.ones(100, 2), scale=1.0)}
    form = Form(kind="embedding", tied=("lm_head",))
    return make_adapter(factors, BASE, Recipe(operation="extract"), forms={"model.embed_tokens": form})


# MLX


def test_mlx_has_both_factors_transposed_and_the_scale_written(tmp_path):
    adapter = random_adapter(ranks={Q_PROJ: 4, UP_PROJ: 2}, scale=0.5)

    save_mlx(adapter, tmp_path)

    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_parameters"] == {
        "rank": 4,
        "scale": 1.0,
        "dropout": 0.0,
        "keys": ["mlp.up_proj", "self_attn.q_proj"],
    }
    tensors = load_file(tmp_path / "adapters.safetensors")
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0))
    for module in (Q_PROJ, UP_PROJ):
        a, b = tensors[f"{module}.lora_a"].float(), tensors[f"{module}.lora_b"].float()
        assert a.shape == (HIDDEN, 4)
        torch.testing.assert_close((x @ a) @ b, x @ delta(adapter, module).T, rtol=1e-4, atol=1e-4)


def test_mlx_refuses_an_embedding(tmp_path):
    with pytest.raises(Unsupported, match="embedding"):
        save_mlx(with_embedding(), tmp_path)


# Image models

ATTENTION = "transformer_blocks.0.attn.to_q"


def image_adapter() -> Adapter:
    generator = torch.Generator().manual_seed(0)
    factors = {
        ATTENTION: LowRank(
            A=torch.randn(4, 32, generator=generator), B=torch.randn(32, 4, generator=generator), scale=2.0
        )
    }
    base = BaseBinding(name="org/image", base_id=None, architecture="Transformer2DModel")
    return make_adapter(factors, base, Recipe(operation="extract"))


def test_diffusers_loads_what_is_exported(tmp_path):
    """Its own loader into its own model, and the layer's output with it."""
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders import FluxLoraLoaderMixin

    adapter = image_adapter()
    save_diffusers(adapter, tmp_path / "pytorch_lora_weights.safetensors", "transformer")
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    before = model.transformer_blocks[0].attn.to_q.weight.clone()
    state, alphas = FluxLoraLoaderMixin.lora_state_dict(tmp_path, return_alphas=True)

    FluxLoraLoaderMixin.load_lora_into_transformer(state, network_alphas=alphas, transformer=model, adapter_name="a")

    layer = model.transformer_blocks[0].attn.to_q
    x = torch.randn(3, 32)
    expected = x @ (before + delta(adapter, ATTENTION)).T + layer.base_layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_kohya_has_down_up_and_alpha(tmp_path):
    adapter = image_adapter()

    save_kohya(adapter, tmp_path / "lora.safetensors", "unet")

    tensors = load_file(tmp_path / "lora.safetensors")
    stem = "lora_unet_transformer_blocks_0_attn_to_q"
    assert set(tensors) == {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"}
    down, up = tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"]
    torch.testing.assert_close(tensors[f"{stem}.alpha"] / down.shape[0] * up @ down, delta(adapter, ATTENTION))


# The table


def answers(adapter: Adapter) -> dict[str, str]:
    return {f"{verdict.engine} {verdict.version}": verdict.answer for verdict in judge(adapter.header)}


def test_one_rank_everywhere_is_taken_by_every_engine_as_it_is():
    both = {f"model.layers.{layer}.self_attn.o_proj": 8 for layer in range(2)}

    assert set(answers(random_adapter(ranks=both)).values()) == {"yes"}


def test_ranks_of_their_own_want_the_portable_profile_where_patterns_are_not_read():
    found = answers(random_adapter(ranks={"model.layers.0.self_attn.o_proj": 4, "model.layers.1.mlp.down_proj": 2}))

    assert {engine for engine, answer in found.items() if answer == "yes"} == {
        "PEFT 0.21",
        "vLLM 0.33",
        "diffusers 0.42",
        "kohya 2026-11",
    }
    assert set(found.values()) == {"yes", "portable"}


def test_a_layer_that_lacks_a_module_is_told_for_lorax():
    ranks = dict.fromkeys(("0.self_attn.o_proj", "0.mlp.down_proj", "1.mlp.down_proj"), 4)
    ranks = {f"model.layers.{name}": rank for name, rank in ranks.items()}

    verdicts = {verdict.engine: verdict for verdict in judge(random_adapter(ranks=ranks).header)}

    assert verdicts["LoRAX"].answer == "portable"
    assert "drops" in verdicts["LoRAX"].reason
    assert verdicts["SGLang"].answer == "yes"


def test_an_embedding_is_refused_with_reason_and_remedy():
    verdicts = {verdict.engine: verdict for verdict in judge(with_embedding().header)}

    assert verdicts["PEFT"].answer == "yes"
    assert verdicts["vLLM"].answer == "yes"
    for engine in ("LoRAX", "llama.cpp", "Ollama", "MLX-LM"):
        assert verdicts[engine].answer == "no"
        assert "embedding" in verdicts[engine].reason
        assert "--exclude" in verdicts[engine].remedy
