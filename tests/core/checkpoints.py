"""Checkpoints of a few tensors, written as the Hub's are."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TENSORS = {
    "model.embed_tokens.weight": torch.arange(12, dtype=torch.bfloat16).reshape(4, 3),
    "model.layers.0.mlp.up_proj.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "model.norm.weight": torch.ones(3, dtype=torch.float16),
}
CONFIG = {"architectures": ["LlamaForCausalLM"], "_name_or_path": "org/tiny"}


def write_single(folder: Path, tensors: Mapping[str, torch.Tensor] = TENSORS, config: Any = CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_sharded(folder: Path, tensors: Mapping[str, torch.Tensor] = TENSORS, config: Any = CONFIG) -> Path:
    """One tensor per shard, with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: f"model-{i:05}-of-{len(tensors):05}.safetensors" for i, name in enumerate(tensors, start=1)}
    for name, file in files.items():
        save_file({name: tensors[name]}, folder / file)
    write_index(folder, files)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
