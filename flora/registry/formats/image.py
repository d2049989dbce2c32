"""LoRA files of image models: diffusers' and kohya's, each one safetensors file.

diffusers   PREFIX.module.lora_A.weight, PREFIX.module.lora_B.weight; no alpha: the scale is folded in
kohya       lora_PREFIX_module_with_underscores.lora_down.weight, .lora_up.weight, .alpha; Flux's and Wan's
            modules are called as their authors call them (`flux.py`, `wan.py`), the others' as diffusers does
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from flora.adapter import Adapter
from flora.errors import Unsupported
from flora.forms import LINEAR
from flora.lowrank import LowRank
from flora.registry.formats import flux, wan
from flora.registry.formats.compat import judge
from flora.registry.formats.kinds import kind_of
from flora.registry.formats.portable import fold_scales
from flora.registry.formats.spelling import PREFIX as _PEFT_PREFIX
from flora.registry.formats.spelling import spell
from flora.registry.formats.tensors import encode

Part = Literal["transformer", "unet", "text_encoder", "text_encoder_2"]  # of the pipeline that the base is
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "lora.safetensors"
_KOHYA = {"transformer": "lora_unet", "unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
_CLIP = "CLIPTextModel"  # how architectures start whose modules lie in one that transformers 5 no longer has
_CLIP_HOME = "text_model."


def save_diffusers(adapter: Adapter, path: Path, part: Part) -> None:
    """Writes the file that `pipeline.load_lora_weights` reads. Raises Unsupported."""
    folded = _folded(adapter, "diffusers")
    tensors = {
        f"{part}.{name}": tensor
        for module, factors in folded.factors.items()
        for name, tensor in _spelled(module, factors, folded).items()
    }
    path.write_bytes(b"".join(encode(tensors)))


def save_kohya(adapter: Adapter, path: Path, part: Part) -> None:
    """Writes the file that kohya's scripts and many user interfaces read. Raises Unsupported."""
    folded = _folded(adapter, "kohya")
    tensors: dict[str, Tensor] = {}
    for module, lowrank in _by_authors_names(folded).items():
        stem = f"{_KOHYA[part]}_{module.replace('.', '_')}"
        for name, tensor in _spelled(module, lowrank, folded).items():
            half = "lora_down" if name.endswith("lora_A.weight") else "lora_up"
            tensors[f"{stem}.{half}.weight"] = tensor
        tensors[f"{stem}.alpha"] = torch.tensor(float(lowrank.rank))
    path.write_bytes(b"".join(encode(tensors)))


def _by_authors_names(adapter: Adapter) -> Mapping[str, LowRank]:
    """The factors of each module as its model's authors call it, where that is known."""
    architecture = adapter.header.base.architecture
    if architecture == flux.ARCHITECTURE:
        return flux.by_authors_names(adapter.factors, _widths(adapter))
    if architecture == wan.ARCHITECTURE:
        return wan.by_authors_names(adapter.factors)
    if architecture.startswith(_CLIP):
        return {_CLIP_HOME + name.removeprefix(_CLIP_HOME): lowrank for name, lowrank in adapter.factors.items()}
    return adapter.factors


def _folded(adapter: Adapter, engine: str) -> Adapter:
    """The adapter with its scales folded in, if the engine takes it."""
    verdict = next(verdict for verdict in judge(adapter.header) if verdict.engine == engine)
    if verdict.answer == "no":
        raise Unsupported(f"{engine} cannot apply this adapter: {verdict.reason}", fix=verdict.remedy)
    return fold_scales(adapter)


def _spelled(module: str, factors: LowRank, adapter: Adapter) -> dict[str, Tensor]:
    """The factors under PEFT's names without its prefix."""
    form = adapter.header.forms.get(module, LINEAR)
    return {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in spell(module, factors, form).items()}


def _widths(adapter: Adapter) -> dict[str, int]:
    """out_features by kind of module: of all that the report lists, changed or not, and of all that have factors."""
    listed = adapter.report.tensors if adapter.report else ()
    shapes = {kind_of(tensor.name.removesuffix(".weight")): tensor.shape for tensor in listed}
    known = {kind: shape[0] for kind, shape in shapes.items() if len(shape) == 2}
    return known | {kind_of(module.name): module.out_features for module, _ in adapter}
