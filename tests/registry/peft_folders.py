"""PEFT folders as other tools would write them, and ways to change what is in them."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from flora.registry.formats.peft import save_peft
from tests.registry.adapters import Q_PROJ, random_adapter

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "flora.json"
A_KEY = f"base_model.model.{Q_PROJ}.lora_A.weight"


def as_foreign(folder: Path, **options: object) -> Path:
    """A folder as another tool would write it: without Flora's record."""
    save_peft(random_adapter(**options), folder)
    (folder / RECORD).unlink()
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
