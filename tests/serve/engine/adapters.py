"""Random adapters, as Flora holds them and as PEFT does."""

import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from flora.adapter import Adapter, BaseBinding, Recipe, make_adapter
from flora.kernels import MODULES
from flora.lowrank import LowRank
from flora.serve.engine.model.config import ModelConfig


def module_name(layer: int, module: str) -> str:
    return f"model.layers.{layer}.{'self_attn' if module in 'qkvo' else 'mlp'}.{module}_proj"


def random_adapter(
    config: ModelConfig,
    seed: int,
    *,
    ranks: Sequence[int] = range(1, 65),
    absent: float = 0.2,
    gain: float = 1.0,
    base_id: str | None = None,
) -> Adapter:
    """An adapter of this seed: each module has a rank of its own drawn from `ranks`, and some have none.

    gain  size of a delta beside the base's weights: 1 changes the answers, and does not drown them
    """
    random, generator = Random(seed), torch.Generator().manual_seed(seed)
    factors = {}
    for layer in range(config.num_layers):
        for module in MODULES:
            if random.random() < absent:
                continue
            rank, (in_features, out_features) = random.choice(ranks), config.module_shape(module)
            size = gain * (0.1 / rank / in_features**0.5) ** 0.5
            factors[module_name(layer, module)] = LowRank(
                A=torch.randn(rank, in_features, generator=generator) * size,
                B=torch.randn(out_features, rank, generator=generator) * size,
                scale=random.choice((0.5, 1.0, 2.0)),
            )
    binding = BaseBinding(name="tiny", base_id=base_id)
    return make_adapter(factors, binding, Recipe(operation="import"))


def rounded_to_fp8(adapter: Adapter) -> Adapter:
    """Each matrix rounded by torch to e4m3, after a power of two that brings its largest number to 224 or more."""

    def rounded(matrix: Tensor) -> Tensor:
        power = 2.0 ** math.floor(math.log2(448 / float(matrix.abs().max())))
        return (matrix * power).to(torch.float8_e4m3fn).float() / power

    factors = {name: replace(f, A=rounded(f.A), B=rounded(f.B)) for name, f in adapter.factors.items()}
    return replace(adapter, factors=factors)


def with_peft(model: PreTrainedModel, adapter: Adapter) -> PeftModel:
    """The judge: PEFT's model with the same factors. It wraps `model` in place."""
    modules = adapter.header.modules
    names = [module.name for module in modules]
    config = LoraConfig(
        r=1,
        lora_alpha=1,
        target_modules=names,
        rank_pattern={module.name: module.rank for module in modules},
        alpha_pattern={module.name: module.alpha for module in modules},
    )
    wrapped = get_peft_model(model, config).eval()
    layers = dict(wrapped.base_model.model.named_modules())
    with torch.no_grad():
        for name, factors in adapter.factors.items():
            layers[name].lora_A["default"].weight.copy_(factors.A)
            layers[name].lora_B["default"].weight.copy_(factors.B)
            assert layers[name].scaling["default"] == factors.scale
    return wrapped
