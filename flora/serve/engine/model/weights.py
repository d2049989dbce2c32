"""The base's weights, read once from its checkpoint into the form that the forward pass multiplies by."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.checkpoint import Checkpoint
from flora.errors import CheckpointError, ShapeMismatch
from flora.kernels import PackedLinear
from flora.serve.engine.model.config import ModelConfig

_RECOMPUTED = ("rotary_emb.inv_freq",)  # buffers of old checkpoints: made from config.json instead


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    input_norm: Tensor  # [hidden_size]
    qkv: PackedLinear  # [q_size + 2 * kv_size, hidden_size]
    q_norm: Tensor | None  # [head_dim], Qwen3
    k_norm: Tensor | None
    o: PackedLinear  # [hidden_size, q_size]
    post_norm: Tensor  # [hidden_size]
    gate_up: PackedLinear  # [2 * intermediate_size, hidden_size]
    down: PackedLinear  # [hidden_size, intermediate_size]


@dataclass(frozen=True, slots=True, eq=False)
class ModelWeights:
    embedding: Tensor  # [vocab_size, hidden_size]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [hidden_size]
    head: PackedLinear  # [vocab_size, hidden_size]


def load_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    row_invariant: bool = False,
) -> ModelWeights:
    """The base in `dtype` on `device`; q, k, v and gate, up lie fused.

    row_invariant  see PackedLinear
    Raises CheckpointError (a tensor is missing, or there is one that the model has no place for) and ShapeMismatch.
    """
    check_tensors(checkpoint, config)

    def load(name: str) -> Tensor:
        return checkpoint.load(name).to(device=device, dtype=dtype)

    def linear(*modules: str) -> PackedLinear:
        weights = [load(f"{module}.weight") for module in modules]
        biases = [load(f"{module}.bias") for module in modules if f"{module}.bias" in checkpoint.tensors]
        bias = torch.cat(biases) if biases else None
        return PackedLinear(torch.cat(weights), bias, row_invariant=row_invariant)

    def layer(index: int) -> LayerWeights:
        at = f"model.layers.{index}"
        return LayerWeights(
            input_norm=load(f"{at}.input_layernorm.weight"),
            qkv=linear(*(f"{at}.self_attn.{part}_proj" for part in "qkv")),
            q_norm=load(f"{at}.self_attn.q_norm.weight") if config.qk_norm else None,
            k_norm=load(f"{at}.self_attn.k_norm.weight") if config.qk_norm else None,
            o=linear(f"{at}.self_attn.o_proj"),
            post_norm=load(f"{at}.post_attention_layernorm.weight"),
            gate_up=linear(f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"),
            down=linear(f"{at}.mlp.down_proj"),
        )

    return ModelWeights(
        embedding=load("model.embed_tokens.weight"),
        layers=tuple(layer(index) for index in range(config.num_layers)),
        norm=load("model.norm.weight"),
        head=linear("model.embed_tokens" if config.tied else "lm_head"),
    )


def draw_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int = 0, *, row_invariant: bool = False
) -> ModelWeights:
    """A base of this shape drawn at random on `device`: for speed, which does not depend on the weights."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02, generator=generator)

    def ones(size: int) -> Tensor:
        return torch.ones(size, dtype=dtype, device=device)

    def linear(*modules: str, has_bias: bool = False) -> PackedLinear:
        shapes = [config.module_shape(module) for module in modules]
        out_features = sum(out for _, out in shapes)
        weight, bias = draw(out_features, shapes[0][0]), draw(out_features) if has_bias else None
        return PackedLinear(weight, bias, row_invariant=row_invariant)

    embedding = draw(config.vocab_size, config.hidden_size)
    head = embedding if config.tied else draw(config.vocab_size, config.hidden_size)
    return ModelWeights(
        embedding=embedding,
        layers=tuple(
            LayerWeights(
                input_norm=ones(config.hidden_size),
                qkv=linear("q", "k", "v", has_bias=config.qkv_bias),
                q_norm=ones(config.head_dim) if config.qk_norm else None,
                k_norm=ones(config.head_dim) if config.qk_norm else None,
                o=linear("o", has_bias=config.o_bias),
                post_norm=ones(config.hidden_size),
                gate_up=linear("gate", "up", has_bias=config.mlp_bias),
                down=linear("down", has_bias=config.mlp_bias),
            )
            for _ in range(config.num_layers)
        ),
        norm=ones(config.hidden_size),
        head=PackedLinear(head, row_invariant=row_invariant),
    )


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Every tensor has its place and its shape, by the headers alone. Raises CheckpointError, ShapeMismatch."""
    expected = dict(expected_shapes(config))
    for name, shape in expected.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{checkpoint.path} has no tensor {name}", cause=f"config.json describes {config.architecture}"
            )
        if info.shape != shape:
            raise ShapeMismatch(
                f"{name} is {list(info.shape)} in {info.file}, {list(shape)} by config.json", tensor=name
            )
    optional = {"lm_head.weight"} if config.tied else set()
    unknown = [
        name
        for name in checkpoint.tensors
        if name not in expected and name not in optional and not name.endswith(_RECOMPUTED)
    ]
    if unknown:
        raise CheckpointError(
            f"{checkpoint.path} holds {unknown[0]}, which {config.architecture} has no place for",
            cause=f"{len(unknown)} such tensors: the weights are quantized, or of another architecture",
        )


def expected_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that the model reads, with its shape."""
    hidden = config.hidden_size
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    if not config.tied:
        yield "lm_head.weight", (config.vocab_size, hidden)
    biased = {
        **dict.fromkeys("qkv", config.qkv_bias),
        "o": config.o_bias,
        **dict.fromkeys(("gate", "up", "down"), config.mlp_bias),
    }
    for index in range(config.num_layers):
        at = f"model.layers.{index}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        if config.qk_norm:
            yield f"{at}.self_attn.q_norm.weight", (config.head_dim,)
            yield f"{at}.self_attn.k_norm.weight", (config.head_dim,)
        for module, has_bias in biased.items():
            name = f"{at}.{'self_attn' if module in 'qkvo' else 'mlp'}.{module}_proj"
            in_features, out_features = config.module_shape(module)
            yield f"{name}.weight", (out_features, in_features)
            if has_bias:
                yield f"{name}.bias", (out_features,)
