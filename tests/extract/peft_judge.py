"""PEFT as the judge: what it computes from our folder, against the base with truncated deltas added to its weights."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn

from flora.adapter import Adapter
from flora.checkpoint import Checkpoint
from flora.extract import ExtractConfig, Wish, extract
from flora.forms import Form
from flora.rank import RankRule
from flora.registry.formats.paths import rename_tensor, tree_paths
from flora.registry.formats.peft import load_peft, save_peft
from tests.extract.models import save, tune

EVERYTHING = Wish(embeddings=True, vectors=True)
Forward = Callable[[nn.Module], Tensor]


def as_weight(form: Form, matrix: Tensor) -> Tensor:
    """A view of [out, in] in the shape of the weight; of an expert in that of its slice."""
    if form.kind in ("conv1d", "expert_transposed"):
        return matrix.T
    return matrix.unflatten(1, (-1, *form.kernel)) if form.kernel else matrix


def extracted(
    model: nn.Module, folder: Path, *, rank: int = 8, wish: Wish = EVERYTHING, dtype: str = "float32"
) -> tuple[Checkpoint, Checkpoint, Adapter]:
    """Base, tuned and the adapter between them, whose PEFT folder `folder/adapter` reads back as what was saved."""
    base, tuned = save(model, folder / "base"), save(tune(model), folder / "tuned")
    config = ExtractConfig(RankRule(max_rank=rank), factor_dtype=dtype, wish=wish)
    adapter = extract(base, tuned, config).adapter
    save_peft(adapter, folder / "adapter", paths=tree_paths(base.path, adapter.header))
    again = load_peft(folder / "adapter")
    assert again.header == adapter.header
    assert again.header.serving_digest == adapter.header.serving_digest
    return base, tuned, adapter


def with_deltas(model: nn.Module, adapter: Adapter, paths: Mapping[str, str] | None = None) -> nn.Module:
    """A copy of the base model with every truncated delta added to its weight, and whole tensors in their places.

    paths  of modules that the model names otherwise than its checkpoint
    A weight that two modules share is changed once, as in a full fine-tune.
    """
    paths = paths or {}
    model = copy.deepcopy(model)
    tensors: Mapping[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for module, factors in adapter:
            delta = as_weight(module.form, factors.delta())
            weight = tensors[rename_tensor(f"{module.name}.weight", paths)]
            weight += delta.reshape(weight.shape)
        for name, tensor in adapter.exact.items():
            tensors[rename_tensor(name, paths)].copy_(tensor)
    return model


def distance(model: nn.Module, adapter: Adapter, folder: Path, forward: Forward, **options: object) -> float:
    """‖PEFT's output - wanted‖ / ‖wanted - base's‖: how far PEFT is from the truncated deltas, in units of the change.

    model  the base as its library loads it, in float32
    """
    model = model.eval()
    paths = tree_paths(folder / "base", adapter.header)
    with torch.no_grad():
        before, wanted = forward(model), forward(with_deltas(model, adapter, paths))
        adapted = PeftModel.from_pretrained(model, folder / "adapter", **options).eval()
        return float((forward(adapted) - wanted).norm() / (wanted - before).norm())
