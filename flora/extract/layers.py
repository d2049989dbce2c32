"""Which convolutions one pair of factors fits: their library tells what names and shapes do not."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from flora.checkpoint import Checkpoint
from flora.tree import module_tree

if TYPE_CHECKING:
    from torch import nn


def conv_refusals(base: Checkpoint, names: Iterable[str]) -> dict[str, str]:
    """Why some of the base's tensors `names`, of three to five dimensions, get no factors.

    Empty where no library is there to ask: each is then taken for a plain convolution.
    """
    wanted = list(names)
    tree = module_tree(base.path) if wanted else None
    if tree is None:
        return {}
    refusals = {}
    for name in wanted:
        layer = tree.module_of(name)
        reason = None if layer is None else _refusal(layer)
        if reason is not None:
            refusals[name] = reason
    return refusals


def _refusal(layer: "nn.Module") -> str | None:
    from torch import nn

    found: Any = layer
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return "a transposed convolution: PEFT has no LoRA layer for it"
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return f"a weight of {type(layer).__name__}, for which PEFT has no LoRA layer"
    if found.groups > 1:
        return f"a convolution of {found.groups} groups: PEFT's factors would mix the inputs of all"
    return None
