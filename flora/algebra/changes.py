"""What a merge does to a checkpoint: each changed tensor as a function from the base's own."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from flora.adapter import Module
from flora.algebra.combine import Combination, Term, dense
from flora.algebra.parts import Part, merge_exact, modules_of, terms_of
from flora.algebra.places import as_matrix, tensor_name
from flora.checkpoint import FLOAT_DTYPES, Checkpoint, TensorInfo
from flora.errors import NotFinite, Unsupported


def checkpoint_changes(
    parts: Sequence[Part], base: Checkpoint, combination: Combination
) -> dict[str, Callable[[Tensor], Tensor]]:
    """What to do with each tensor of the base that the merge changes, by name: the tensor in, the new one out.

    The new tensor is base + change in float32 (float64 where the base is), rounded once to the base's dtype.
    """
    terms = terms_of(parts)
    modules: dict[str, list[Module]] = {}  # by tensor: several only where experts lie in one
    for module in modules_of(parts).values():
        for tensor in (tensor_name(module, base.tensors), *(f"{tied}.weight" for tied in module.tied)):
            if tensor in base.tensors:
                _check_dtype(base.tensors[tensor])
                modules.setdefault(tensor, []).append(module)
    changes = {tensor: _adding(those, terms, combination) for tensor, those in modules.items()}
    for name, whole in merge_exact(parts, base).items():
        changes[name] = _replacing(whole)
    return changes


def _check_dtype(info: TensorInfo) -> None:
    """Raises Unsupported for a quantized weight: what is added to it would have to be quantized too."""
    if info.dtype not in FLOAT_DTYPES:
        raise Unsupported(
            f"{info.name} of {info.file} is stored as {info.dtype}, to which nothing can be added",
            cause="a merged checkpoint keeps each tensor's own format",
            fix="merge into the base as it was before quantization: float32, bfloat16 or float16",
            tensor=info.name,
        )


def _adding(
    modules: Sequence[Module], terms: Mapping[str, Sequence[Term]], combination: Combination
) -> Callable[[Tensor], Tensor]:
    def add(tensor: Tensor) -> Tensor:
        total = tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
        for module in modules:
            as_matrix(total, module).add_(dense(terms[module.name], combination, module.name))
        new = total.to(tensor.dtype)
        if not bool(torch.isfinite(new).all()):
            raise NotFinite(
                f"{module.name} with the merged change does not fit into {str(tensor.dtype).removeprefix('torch.')}",
                fix="give smaller weights",
                tensor=module.name,
            )
        return new

    return add


def _replacing(whole: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tensor: whole.to(tensor.dtype)
