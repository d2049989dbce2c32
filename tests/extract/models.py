"""Tiny real models built by transformers, fine-tuned by adding known changes, saved as transformers saves them."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flora.checkpoint import Checkpoint, open_checkpoint
from flora.lowrank import LowRank

VOCABULARY = 160
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),  # q, k and v have biases
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),  # q and k have norms
}


def build(architecture: str = "llama", *, tied: bool = True, seed: int = 0, **changes: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    make_config, make_model = ARCHITECTURES[architecture]
    return make_model(make_config(**SIZES | changes, tie_word_embeddings=tied)).eval()


def tune(model: PreTrainedModel, seed: int = 1, only: Callable[[str], bool] = lambda name: True) -> PreTrainedModel:
    """A float32 copy with changed parameters: matrices by five strong directions and some noise, vectors freely."""
    generator = torch.Generator().manual_seed(seed)
    tuned = copy.deepcopy(model).float()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            noise = 2e-4 * torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                left = torch.randn(parameter.shape[0], 5, generator=generator)
                noise += 2e-3 * left @ torch.randn(5, parameter.shape[1], generator=generator)
            if only(name):
                parameter += noise
    return tuned


def save(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> Checkpoint:
    copy.deepcopy(model).to(dtype).save_pretrained(folder, **options)
    return open_checkpoint(folder)


def rewrite(checkpoint: Checkpoint, change: Callable[[dict[str, torch.Tensor]], None]) -> Checkpoint:
    """The same folder with its one file's tensors changed by `change`, opened again."""
    file = checkpoint.path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return open_checkpoint(checkpoint.path)


def delta_of(base: Checkpoint, tuned: Checkpoint, name: str) -> np.ndarray:
    """tuned - base in float64."""
    return tuned.load(name).double().numpy() - base.load(name).double().numpy()


def residual_share(delta: np.ndarray, factors: LowRank) -> float:
    """‖delta - scale * B @ A‖² / ‖delta‖², the residual formed whole in float64."""
    product = factors.scale * factors.B.double().numpy() @ factors.A.double().numpy()
    return float(np.square(delta - product).sum() / np.square(delta).sum())


def best_share(delta: np.ndarray, rank: int) -> float:
    """The energy share that no `rank` columns can exceed: numpy's full SVD in float64 (Eckart-Young)."""
    squares = np.square(np.linalg.svd(delta, compute_uv=False))
    return float(squares[:rank].sum() / squares.sum())
