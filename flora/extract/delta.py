"""The change of one tensor: tuned - base in float32, its exact squared norm, and what of it is rounding."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_CHUNK = {"cpu": 1 << 17, "cuda": 1 << 26}  # elements at once; on a CPU half a MiB of float32, which stays in the cache
_SAMPLE = 1 << 14  # elements that the noise estimate looks at, in evenly spaced rows
_EXPONENT = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}  # the bits that hold it
_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    """tuned - base. `values` lies in the workspace that `compute_delta` was given, until its next use."""

    values: Tensor | None  # [out, in] float32; None where nothing changed, or without a workspace
    norm_squared: float  # of the whole tensor, summed in float64; NaN or infinite if a weight is
    noise: float  # estimated part of norm_squared that rounding to the tuned checkpoint's dtype put there
    num_changed: int = 0  # elements that differ


class Workspace:
    """Memory for one delta, used again for the next: fresh pages cost more than the subtraction."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self._buffer = torch.empty(0, device=device)

    def matrix(self, shape: torch.Size) -> Tensor:
        """An uninitialized float32 tensor of `shape`, in the memory of the one handed out before."""
        numel = shape.numel()
        if self._buffer.numel() < numel:
            device = self._buffer.device
            self._buffer = torch.empty(0, device=device)  # lets go of the old memory before taking the new
            self._buffer = torch.empty(numel, device=device)
        return self._buffer[:numel].view(shape)


def compute_delta(base: Tensor, tuned: Tensor, workspace: Workspace | None = None) -> Delta:
    """The delta of two tensors of one shape and any dtypes; without a workspace its norm and noise alone.

    Differences are taken in float32 (float64 if a side is float64 or an integer): exact but for one rounding.
    """
    base, tuned = torch.atleast_1d(base), torch.atleast_1d(tuned)
    if same_bits(base, tuned):
        return Delta(None, 0.0 if is_finite(tuned) else math.nan, 0.0)
    values = workspace.matrix(tuned.shape) if workspace else None
    norm_squared, num_changed = 0.0, 0
    for rows in _row_chunks(tuned):
        chunk = _subtract(base[rows], tuned[rows], values[rows] if values is not None else None)
        norm_squared += _chunk_norm_squared(chunk)
        num_changed += _count_nonzero(chunk)
    if norm_squared == 0:
        return Delta(None, 0.0, 0.0)
    return Delta(values, norm_squared, storage_noise(base, tuned, norm_squared), num_changed)


def storage_noise(base: Tensor, tuned: Tensor, norm_squared: float, ulps: Tensor | None = None) -> float:
    """Expected squared norm of the error that storing `tuned` in its dtype put into the delta: ulp²/12 an element.

    A rounding error is uniform within half an ulp either way, as long as changes are not much smaller than an ulp;
    where they are, this is an upper bound, and never more than `norm_squared`. Rows without any change were not tuned
    and have no error. Neither has the base: its stored values are what the adapter is added to.

    ulps  of each number as it is stored, where it is read in another dtype: fp8 with a scale
    """
    if (ulps is None and tuned.dtype not in _EXPONENT) or tuned.numel() == 0:
        return 0.0
    numel = tuned.numel()
    step = max(1, numel // _SAMPLE)
    base, tuned = base[::step], tuned[::step]
    ulps = _ulps(tuned) if ulps is None else ulps[::step].to(tuned.device).double()
    changed_rows = (base != tuned).any(-1, keepdim=True) if tuned.dim() > 1 else True
    squares = (ulps * changed_rows).square().sum() * numel / tuned.numel()
    return min(float(squares) / 12, norm_squared)


def _ulps(tensor: Tensor) -> Tensor:
    """From each number to the next of its dtype, in float64."""
    bits = tensor.view(_INTEGER[tensor.element_size()]) & _EXPONENT[tensor.dtype]
    power_of_two = bits.view(tensor.dtype).clamp_min(torch.finfo(tensor.dtype).tiny).double()  # the one below |w|
    return power_of_two * 2.0 ** -_MANTISSA_BITS[tensor.dtype]


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one shape hold the same bytes; stops at the first chunk of rows that differs."""
    if left.dtype != right.dtype:
        return False
    integer = _INTEGER[left.element_size()]
    left, right = torch.atleast_1d(left).view(integer), torch.atleast_1d(right).view(integer)
    return all(torch.equal(left[rows], right[rows]) for rows in _row_chunks(left))


def count_differing(base: Tensor, tuned: Tensor) -> int:
    """Elements that differ of two tensors of one shape and any dtypes, which may be no numbers: by their bits."""
    if base.dtype == tuned.dtype:
        integer = _INTEGER[base.element_size()]
        return int(torch.count_nonzero(base.view(integer) != tuned.view(integer)))
    return int(torch.count_nonzero(base.double() != tuned.double()))


def squared_norm(tensor: Tensor) -> float:
    """Sum of squares, in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2 if tensor.dim() else float(tensor) ** 2


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    return not tensor.is_floating_point() or all(
        bool(torch.isfinite(tensor[rows].sum(dtype=torch.float64))) for rows in _row_chunks(torch.atleast_1d(tensor))
    )


def _subtract(base: Tensor, tuned: Tensor, out: Tensor | None) -> Tensor:
    """tuned - base; never in place, for the tensors are maps of files."""
    dtype = torch.promote_types(base.dtype, tuned.dtype)
    if dtype == torch.float64 or not dtype.is_floating_point:
        chunk = tuned.double() - base
        return chunk if out is None else out.copy_(chunk)
    return tuned.float() - base if out is None else out.copy_(tuned).sub_(base)


def _chunk_norm_squared(chunk: Tensor) -> float:
    """Sum of squares, in float64. On a CPU by BLAS: torch's own norm of the same copy takes twice the time."""
    if chunk.is_cuda:
        return float(torch.linalg.vector_norm(chunk, dtype=torch.float64)) ** 2
    flat = chunk.flatten().double()
    return float(flat.dot(flat))


def _count_nonzero(chunk: Tensor) -> int:
    """Elements that are not 0; NaN is not. On a CPU by numpy: a twentieth of the time of torch's own count."""
    return int(torch.count_nonzero(chunk) if chunk.is_cuda else np.count_nonzero(chunk.numpy() != 0))


def _row_chunks(tensor: Tensor) -> Iterator[slice]:
    num_rows = tensor.shape[0]
    step = max(1, _CHUNK[tensor.device.type] * num_rows // max(1, tensor.numel()))
    return (slice(start, start + step) for start in range(0, num_rows, step))
