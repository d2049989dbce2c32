"""LoRA files of image models: diffusers' and kohya's, each one safetensors file.

diffusers   PREFIX.module.lora_A.weight, PREFIX.module.lora_B.weight; no alpha: the scale is folded in
kohya       lora_PREFIX_module_with_underscores.lora_down.weight, .lora_up.weight, .alpha
"""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from flora.adapter import Adapter
from flora.errors import Unsupported
from flora.registry.formats.compat import judge
from flora.registry.formats.portable import fold_scales
from flora.registry.formats.spelling import PREFIX as _PEFT_PREFIX
from flora.registry.formats.spelling import spell
from flora.registry.formats.tensors import encode

Part = Literal["transformer", "unet", "text_encoder"]  # of the pipeline that the base is
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "lora.safetensors"
_KOHYA = {"transformer": "lora_unet", "unet": "lora_unet", "text_encoder": "lora_te"}


def save_diffusers(adapter: Adapter, path: Path, part: Part) -> None:
    """Writes the file that `pipeline.load_lora_weights` reads. Raises Unsupported."""
    tensors = {}
    for name, tensor in _spelled(adapter, "diffusers").items():
        tensors[f"{part}.{name}"] = tensor
    path.write_bytes(b"".join(encode(tensors)))


def save_kohya(adapter: Adapter, path: Path, part: Part) -> None:
    """Writes the file that kohya's scripts and many user interfaces read. Raises Unsupported."""
    tensors: dict[str, Tensor] = {}
    ranks = {module.name: module.rank for module in adapter.header.modules}
    for name, tensor in _spelled(adapter, "kohya").items():
        module, _, half = name.removesuffix(".weight").rpartition(".")
        stem = f"{_KOHYA[part]}_{module.replace('.', '_')}"
        tensors[f"{stem}.{'lora_down' if half == 'lora_A' else 'lora_up'}.weight"] = tensor
        tensors[f"{stem}.alpha"] = torch.tensor(float(ranks[module]))
    path.write_bytes(b"".join(encode(tensors)))


def _spelled(adapter: Adapter, engine: str) -> dict[str, Tensor]:
    """The factors under PEFT's names without its prefix, scales folded in."""
    verdict = next(verdict for verdict in judge(adapter.header) if verdict.engine == engine)
    if verdict.answer == "no":
        raise Unsupported(f"{engine} cannot apply this adapter: {verdict.reason}", fix=verdict.remedy)
    folded = fold_scales(adapter)
    forms = folded.header.forms
    return {
        name.removeprefix(_PEFT_PREFIX): tensor
        for module, lowrank in folded.factors.items()
        for name, tensor in spell(module, lowrank, forms[module]).items()
    }
