"""What class a module is, where its name does not tell: the library that loads the adapter goes by classes."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from flora.checkpoint import Checkpoint
from flora.extract.kinds import Finding
from flora.extract.pair import TensorPair
from flora.forms import is_expert
from flora.tree import ModuleTree, module_tree

if TYPE_CHECKING:
    from torch import nn

_ASKED = ("linear", "conv1d", "conv")  # tables and parameters are told by their names
_USUAL = re.compile(  # decoders that everyone names like Llama's: importing their library takes seconds
    r"model\.layers\.\d+\.(self_attn\.\w+|mlp\.\w+|mlp\.experts\.\d+\.\w+)|model\.(embed_tokens|norm)|lm_head"
)


def classes_say(base: Checkpoint, pairs: Iterable[TensorPair]) -> dict[str, Finding]:
    """What some of the pairs are by the class of their module, if not what they were taken for; by name.

    Empty where no library is there to ask: a convolution is then taken for a plain one, a matrix for a linear layer's.
    """
    asked = {
        pair.name: pair.base.name
        for pair in pairs
        if pair.base and _is_asked(pair) and not _USUAL.fullmatch(pair.name.rpartition(".")[0])
    }
    tree = module_tree(base.path) if asked else None
    if tree is None:
        return {}
    found = {name: _find(tree, stored) for name, stored in asked.items()}
    kinds = {pair.name: pair.kind for pair in pairs}
    return {name: finding for name, finding in found.items() if finding and finding.kind != kinds[name]}


def _is_asked(pair: TensorPair) -> bool:
    """Of what is carried whole, biases alone: they may belong to a matrix that is no layer's."""
    if pair.status == "exact":
        return pair.name.endswith(".bias")
    return pair.status == "extractable" and pair.kind in _ASKED


def _find(tree: ModuleTree, name: str) -> Finding | None:
    """The finding on one weight; None if the tree has no layer of its own for it, as for an expert."""
    from torch import nn

    layer = tree.module_of(name)
    if layer is None and tree.is_converted(name) and not is_expert(name.rpartition(".")[0]):
        return Finding(reason="transformers splits it, or joins it with others, while it loads: no layer is left of it")
    if layer is None or name.endswith(".bias"):
        return None
    if any(isinstance(parent, nn.MultiheadAttention) for parent in tree.parents_of(name)):
        return Finding(reason="a part of torch's MultiheadAttention, whose code reads the weight past its layer")
    if isinstance(layer, nn.Linear):
        return Finding("linear")
    if type(layer).__name__ == "Conv1D":
        return Finding("conv1d")
    if type(layer) is nn.Embedding:
        return Finding("embedding")
    return _find_conv(layer) if tree.tensors[tree.tensor_path(name) or name].dim() > 2 else Finding("parameter")


def _find_conv(layer: "nn.Module") -> Finding:
    from torch import nn

    found: Any = layer
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return Finding(reason="a transposed convolution: PEFT has no LoRA layer for it")
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return Finding(reason=f"a weight of {type(layer).__name__}, for which PEFT has no LoRA layer")
    if found.groups > 1:
        return Finding(reason=f"a convolution of {found.groups} groups: PEFT's factors would mix the inputs of all")
    return Finding("conv")
