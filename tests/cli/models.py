"""A base and a full fine-tune of it in a second: real checkpoints of a real architecture, only not trained."""

import json
import shutil
from pathlib import Path

import torch

from flora.demo.folders import load_model, save_model
from flora.demo.model import LlamaShape, TinyLlama

SHAPE = LlamaShape(hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2)
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }} {% endfor %}assistant: "
DELTA_RANK = 4  # of the change of every linear layer, but for a little noise


def make_base(folder: Path, seed: int = 0) -> Path:
    save_model(TinyLlama(SHAPE, seed), folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def make_tuned(base: Path, folder: Path, seed: int = 1, table_change: float = 1e-3) -> Path:
    """Every weight of `base` changed: linear layers by something of rank 4 and noise, the rest by noise alone."""
    generator = torch.Generator().manual_seed(seed)
    model = load_model(base, SHAPE)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 2 and "embed_tokens" not in name:
                left = torch.randn(weight.shape[0], DELTA_RANK, generator=generator)
                right = torch.randn(DELTA_RANK, weight.shape[1], generator=generator)
                weight += 0.02 * left @ right + 1e-3 * noise
            else:
                weight += table_change * noise
    save_model(model, folder)
    shutil.copy(base / "chat_template.jinja", folder)
    return folder


def rename_base(folder: Path, name: str) -> None:
    """Lets the checkpoint call itself `name`, as one that came from the Hub does."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": name}))
