"""transformers and PEFT as judges of mixtures: PEFT's forward pass, and a full fine-tune by the truncated deltas."""

import shutil
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flora.adapter import Adapter
from flora.checkpoint import open_checkpoint
from flora.forms import EXPERT_KINDS, expert_slice, stack_name
from tests.extract.moe import FUSED, SEPARATE
from tests.extract.peft_judge import as_weight

TOKENS = torch.arange(20)[None]
ROUNDING = 3e-4  # float32, in units of the change


def written(base: Path, adapter: Adapter, folder: Path) -> Path:
    """The base's files with every truncated delta added to its tensor: what a full fine-tune would have saved."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    for module, factors in adapter:
        delta = factors.delta()
        if module.kind in EXPERT_KINDS:
            stack = tensors[stack_name(module.name, tensors)]
            expert_slice(module.name, module.kind, stack).add_(delta)
        else:
            tensors[f"{module.name}.weight"] += as_weight(module.form, delta)
    save_file(tensors | adapter.exact, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def opened(folder: Path) -> nn.Module:
    made = getattr(transformers, open_checkpoint(folder).architecture)
    return made.from_pretrained(folder, dtype=torch.float32).eval()


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return opened(folder)(input_ids=TOKENS).logits


def distance(base: Path, adapter: Adapter, folder: Path) -> float:
    """How far PEFT is from the truncated deltas, in units of the change."""
    before, wanted = logits(base), logits(written(base, adapter, folder / "wanted"))
    with torch.no_grad():
        got = PeftModel.from_pretrained(opened(base), folder / "adapter").eval()(input_ids=TOKENS).logits
    return float((got - wanted).norm() / (wanted - before).norm())


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = (SEPARATE | FUSED)[name]().eval()
    for parameter in model.parameters():  # some are made as zeros, and a router of zeros gives ties
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model
