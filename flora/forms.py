"""What kind of layer a module is, and how its weight lies as the matrix [out, in] that factors approximate.

linear     weight [out, in]: the matrix itself
embedding  weight [tokens, features]: the table itself, so that a tied output head has the very same factors
conv1d     GPT-2's Conv1D keeps its weight as [in, out]: transposed
conv       weight [out, in, *kernel]: flattened behind `out`
"""

import math
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["linear", "embedding", "conv1d", "conv"]


class Form(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All that a module's two factors do not tell of its weight."""

    kind: Kind = "linear"
    kernel: tuple[int, ...] = ()  # of a convolution
    tied: tuple[str, ...] = ()  # modules that use an embedding's very weight: an output head


LINEAR = Form()


def matrix_shape(kind: Kind, shape: tuple[int, ...]) -> tuple[int, int]:
    """[out, in] of a weight of `shape`."""
    if kind == "conv1d":
        return shape[1], shape[0]
    return shape[0], math.prod(shape[1:])


def as_matrix(kind: Kind, weight: "Tensor") -> "Tensor":
    """A view of the weight as [out, in]."""
    return weight.T if kind == "conv1d" else weight.flatten(1)


def as_weight(form: Form, matrix: "Tensor") -> "Tensor":
    """A view of [out, in] in the shape of the weight."""
    if form.kind == "conv1d":
        return matrix.T
    return matrix.unflatten(1, (-1, *form.kernel)) if form.kernel else matrix
