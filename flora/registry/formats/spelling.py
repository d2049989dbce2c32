"""How PEFT spells what an adapter holds: names and shapes of tensors, by kind of layer.

    linear, conv1d  M.lora_A.weight [r, in]              M.lora_B.weight [out, r]
    conv            M.lora_A.weight [r, in, *kernel]     M.lora_B.weight [out, r, 1, …]
    embedding       M.lora_embedding_A [r, tokens]       M.lora_embedding_B [features, r]
    exact           M.weight, M.bias                     a bias beside factors: M.base_layer.bias; beside two stacks of
                                                         experts: M.experts.base_layer.base_layer.down_proj_bias
    new rows        M.token_adapter.trainable_tokens_delta [rows, features]: the rows themselves, whatever the name says

An embedding's factors here are of its table [tokens, features]: PEFT's are of the transposed one, so they trade places.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from flora.adapter import ExactTensor
from flora.forms import LINEAR, Form

if TYPE_CHECKING:
    from torch import Tensor

    from flora.lowrank import LowRank

PREFIX = "base_model.model."  # what PEFT puts before a module's path
FACTOR = re.compile(
    r"base_model\.model\.(?P<module>[\w.\-]+)\.lora_(?:(?P<half>[AB])\.weight|embedding_(?P<table>[AB]))", re.ASCII
)
_TABLES = ("embed_tokens", "shared")  # leaves of modules that look tokens up; other tied modules are linear heads


def spell(module: str, factors: "LowRank", form: Form = LINEAR) -> dict[str, "Tensor"]:
    """The module's two tensors under PEFT's names."""
    path, A, B = PREFIX + module, factors.A, factors.B
    if form.kind == "embedding":
        return {f"{path}.lora_embedding_A": B.T.contiguous(), f"{path}.lora_embedding_B": A.T.contiguous()}
    if form.kind == "conv":
        A, B = A.unflatten(1, (-1, *form.kernel)), B.reshape(*B.shape, *(1 for _ in form.kernel))
    return {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}


def unspell(module: str, tensors: Mapping[str, "Tensor"], form: Form = LINEAR) -> "tuple[Tensor, Tensor] | None":
    """A [rank, in] and B [out, rank] of the module as a matrix; None if a tensor is missing or has no such shape."""
    path = PREFIX + module
    names = ("lora_embedding_B", "lora_embedding_A") if form.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
    A, B = (tensors.get(f"{path}.{name}") for name in names)
    if A is None or B is None or A.ndim != 2 + len(form.kernel) or B.ndim != A.ndim:
        return None
    if form.kind == "embedding":
        return A.T.contiguous(), B.T.contiguous()
    return A.flatten(1), B.flatten(1)


def is_transposed(name: str) -> bool:
    """Whether the tensor of that name lies transposed to the factor that it is."""
    factor = FACTOR.fullmatch(name)
    return bool(factor and factor["table"])


def tied_form(module: str) -> Form:
    """The form of a module that shares an embedding's weight, by its name."""
    return Form(kind="embedding") if module.rpartition(".")[2] in _TABLES else LINEAR


def spell_tied(factors: Mapping[str, "LowRank"], forms: Mapping[str, Form]) -> dict[str, "Tensor"]:
    """The tensors of every module that is tied to an adapted embedding: PEFT adapts each side by itself."""
    tensors: dict[str, Tensor] = {}
    for name, lowrank in factors.items():
        for tied in forms[name].tied:
            tensors |= spell(tied, lowrank, tied_form(tied))
    return tensors


def spell_exact(tensor: ExactTensor, wraps: Mapping[str, int] | None = None) -> str:
    """The name of a tensor that an adapter carries whole.

    wraps  of modules that have factors, how many layers PEFT puts around them: one, or one for each parameter
    """
    name = tensor.name
    module, _, leaf = name.rpartition(".")
    if tensor.first_row is not None:
        return f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"
    return f"{PREFIX}{module}{'.base_layer' * (wraps or {}).get(module, 0)}.{leaf}"
