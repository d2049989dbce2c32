"""What kind of layer a module is, and how its weight lies as the matrix [out, in] that factors approximate.

linear             weight [out, in]: the matrix itself
parameter          the same, but its class is no linear layer: a router, a table of positions read by other means
embedding          weight [tokens, features]: the table itself, so that a tied output head has the very same factors
conv1d             GPT-2's Conv1D keeps its weight as [in, out]: transposed
conv               weight [out, in, *kernel]: flattened behind `out`
expert             one of several in a tensor [experts, out, in]; the module M.experts.3.down_proj is its slice 3
expert_transposed  the same in a tensor [experts, in, out]
"""

import math
import re
from collections.abc import Container
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["linear", "parameter", "embedding", "conv1d", "conv", "expert", "expert_transposed"]
EXPERT_KINDS = ("expert", "expert_transposed")

STACKS = {  # where a checkpoint keeps the experts of M.experts.N.LEAF, by leaf; M stands before each
    "gate_up_proj": (
        "experts.gate_up_proj",
        "experts.gate_up_proj_blocks",  # MXFP4
        "input_linear.weight",
        "experts.fc1.weight",
    ),
    "down_proj": ("experts.down_proj", "experts.down_proj_blocks", "output_linear.weight", "experts.fc2.weight"),
    "input_linear": ("input_linear.weight",),  # JetMoE's, which are modules of their own in its attention, too
    "output_linear": ("output_linear.weight",),
}
_EXPERT = re.compile(r"(?P<parent>.+)\.experts\.(?P<index>\d+)\.(?P<leaf>\w+)", re.ASCII)


class Form(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All that a module's two factors do not tell of its weight."""

    kind: Kind = "linear"
    kernel: tuple[int, ...] = ()  # of a convolution
    tied: tuple[str, ...] = ()  # modules that use an embedding's very weight: an output head
    experts: int = 0  # how many there are of which this is one, in one tensor or apart


LINEAR = Form()


def matrix_shape(kind: Kind, shape: tuple[int, ...]) -> tuple[int, int]:
    """[out, in] of a weight of `shape`; of an expert its own, as `expert_slice` gives it."""
    if kind == "conv1d":
        return shape[1], shape[0]
    return shape[0], math.prod(shape[1:])


def as_matrix(kind: Kind, weight: "Tensor") -> "Tensor":
    """A view of the weight as [out, in]; of an expert its slice is that already."""
    return weight.T if kind == "conv1d" else weight.flatten(1)


def is_expert(module: str) -> bool:
    """Whether this names one expert of a mixture, wherever its weight lies."""
    return _EXPERT.fullmatch(module) is not None


def split_expert(module: str) -> tuple[str, int, str]:
    """M, 3 and down_proj of M.experts.3.down_proj, the name of a module of an expert kind."""
    match = _EXPERT.fullmatch(module)
    assert match is not None, module
    return match["parent"], int(match["index"]), match["leaf"]


def weight_name(module: str, kind: Kind, names: Container[str]) -> str | None:
    """The tensor among `names` that a module of that kind changes: its `.weight`, a parameter of its very name, or the
    tensor of all experts; None if there is none of these.
    """
    for own in (f"{module}.weight", module):
        if own in names:
            return own
    return stack_name(module, names) if kind in EXPERT_KINDS else None


def stack_name(module: str, names: Container[str]) -> str | None:
    """The tensor among `names` that holds the experts of which `module` is one, if any does."""
    match = _EXPERT.fullmatch(module)
    if match is None:
        return None
    found = (f"{match['parent']}.{place}" for place in STACKS.get(match["leaf"], ()))
    return next((name for name in found if name in names), None)


def expert_slice(module: str, kind: Kind, stack: "Tensor") -> "Tensor":
    """A view of the expert's own matrix [out, in] in the tensor of all."""
    _, index, _ = split_expert(module)
    return stack[index].T if kind == "expert_transposed" else stack[index]
