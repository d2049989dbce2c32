"""Where an adapter's factors go: the tensor of a checkpoint that a module changes, and that tensor as a matrix."""

from collections.abc import Container

from torch import Tensor

from flora import forms
from flora.adapter import Module
from flora.errors import BaseMismatch


def tensor_name(module: Module, names: Container[str]) -> str:
    """The tensor of a checkpoint that `module` changes, as `forms.weight_name` finds it.

    Raises BaseMismatch if `names` holds none.
    """
    name = forms.weight_name(module.name, module.kind, names)
    if name is not None:
        return name
    raise BaseMismatch(
        f"{module.name} of the adapter is not in the base",
        cause="the adapter was made for another base, or its names differ",
        fix="give the base that `flora show` names",
        tensor=module.name,
    )


def as_matrix(tensor: Tensor, module: Module) -> Tensor:
    """The tensor as the matrix [out_features, in_features] that the factors add to: a view of it.

    Raises BaseMismatch if it has another shape.
    """
    if tensor.dim() >= 2:
        if module.kind in forms.EXPERT_KINDS and tensor.dim() == 3:
            tensor = forms.expert_slice(module.name, module.kind, tensor)
        matrix = forms.as_matrix(module.kind, tensor)
        if matrix.shape == (module.out_features, module.in_features):
            return matrix
    raise BaseMismatch(
        f"{module.name} is {[module.out_features, module.in_features]} in the adapter, {list(tensor.shape)} in the "
        "checkpoint",
        cause="the adapter was made for another base",
        fix="give the base that `flora show` names",
        tensor=module.name,
    )
