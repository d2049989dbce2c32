"""Model shapes to measure with, and random adapters for them.

Speed depends on shapes and not on weights, so a benchmark needs a config.json and draws the rest.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from flora.lowrank import LowRank

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
MODULE_SETS = {"attention": ATTENTION, "all": ALL_LINEAR}
FILES_PER_RANK = 8  # different weights of one rank; further adapters repeat them under a salt of their own
WEIGHT_STD = 0.02


def _shape(hidden: int, ff: int, layers: int, heads: int, kv_heads: int, head_dim: int, vocab: int, tied: bool) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ff,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "rope_theta": 500_000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


SHAPES = {
    "llama3-8b": _shape(4096, 14336, 32, 32, 8, 128, 128_256, tied=False),
    "llama-7b": _shape(4096, 11008, 32, 32, 32, 128, 32_000, tied=False),
    "llama-13b": _shape(5120, 13824, 40, 40, 40, 128, 32_000, tied=False),
    "llama3-1b": _shape(2048, 8192, 16, 32, 8, 64, 128_256, tied=True),
    "smollm2-135m": _shape(576, 1536, 30, 9, 3, 64, 49_152, tied=True),
    "tiny": _shape(64, 128, 2, 4, 2, 16, 32_000, tied=False),
}


def write_config(folder: Path, shape: str) -> Path:
    """`folder` with the shape's config.json and no weights: a base for an engine that draws its own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[shape], indent=1))
    return folder


def write_tokenizer(folder: Path, shape: str) -> None:
    """A tokenizer.json beside the config, for servers: every token id of the shape is a short word of its own."""
    words = {_word(i): i for i in range(SHAPES[shape]["vocab_size"])}
    model = {"type": "BPE", "vocab": words, "merges": [], "unk_token": _word(0), "fuse_unk": False}
    spec: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": model,
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def _word(number: int) -> str:
    """A space and four letters, about as long as a word piece of a real vocabulary."""
    return " " + "".join(chr(ord("a") + number // 26**place % 26) for place in range(4))


def features(shape: str, module: str) -> tuple[int, int]:
    """(in_features, out_features) of one projection."""
    config = SHAPES[shape]
    hidden, ff = config["hidden_size"], config["intermediate_size"]
    q, kv = (config[heads] * config["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))
    return {
        "q_proj": (hidden, q),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (q, hidden),
        "gate_proj": (hidden, ff),
        "up_proj": (hidden, ff),
        "down_proj": (ff, hidden),
    }[module]


def module_names(shape: str, modules: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(projection, module path) of every layer."""
    for layer in range(SHAPES[shape]["num_hidden_layers"]):
        for module in modules:
            yield module, f"model.layers.{layer}.{'self_attn' if module in ATTENTION else 'mlp'}.{module}"


def random_factors(
    shape: str, modules: Sequence[str], rank: int, number: int, dtype: torch.dtype
) -> dict[str, LowRank]:
    """Weights `number` of a rank: A and B ~ N(0, 0.02²), scale 1, drawn on the CPU: equal on all machines."""
    generator = torch.Generator().manual_seed(1000 * rank + number)

    def draw(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * WEIGHT_STD).to(dtype)

    factors = {}
    for module, name in module_names(shape, modules):
        in_features, out_features = features(shape, module)
        factors[name] = LowRank(A=draw(rank, in_features), B=draw(out_features, rank))
    return factors
