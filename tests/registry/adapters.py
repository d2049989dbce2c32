"""Small adapters for the modules of a two-layer Llama."""

from collections.abc import Mapping

import torch

from flora.adapter import Adapter, BaseBinding, Recipe, make_adapter, report_of_factors
from flora.lowrank import LowRank

BASE = BaseBinding(name="org/tiny", base_id="sha256:" + "b" * 64, architecture="LlamaForCausalLM")
HIDDEN, MLP = 32, 48
Q_PROJ, UP_PROJ = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
SHAPES = {
    f"model.layers.{layer}.{module}": shape
    for layer in range(2)
    for module, shape in {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.up_proj": (MLP, HIDDEN),
        "mlp.down_proj": (HIDDEN, MLP),
    }.items()
}  # [out, in]


def random_adapter(
    seed: int = 0,
    ranks: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    scale: float = 1.0,
    base: BaseBinding = BASE,
    extras: Mapping[str, bytes] | None = None,
) -> Adapter:
    """An adapter with random factors, which count as extracted; without `ranks`, two modules of ranks 4 and 2."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: LowRank(
            A=torch.randn(rank, SHAPES[name][1], generator=generator).to(dtype),
            B=torch.randn(SHAPES[name][0], rank, generator=generator).to(dtype),
            scale=scale,
        )
        for name, rank in (ranks or {Q_PROJ: 4, UP_PROJ: 2}).items()
    }
    return make_adapter(factors, base, Recipe(operation="extract"), report_of_factors(factors), extras)
