"""Weights that are stored as fp8 with scales, read as the numbers they stand for.

    block    W[i, j] * scale_inv[i // rows, j // columns]     DeepSeek, Qwen: NAME_scale_inv, quantization_config's
                                                              weight_block_size, 128 by 128 if it does not say
    channel  W[i, j] * scale[i]                               compressed-tensors: NAME_scale [out, 1]
    tensor   W * scale                                        NAME_scale of one element, or one for each expert

The numbers are exact in float32: four bits of an fp8 times a float32 or bf16 scale, rounded once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from flora.checkpoint import Checkpoint
from flora.errors import CheckpointError
from flora.extract.gguf import GgufCheckpoint

if TYPE_CHECKING:
    from torch import Tensor

_SCALES = ("_scale_inv", "_scale")
_BLOCK = (128, 128)
FP8 = "F8_E4M3"


@dataclass(frozen=True, eq=False)
class DequantizedCheckpoint(Checkpoint):
    """A checkpoint whose fp8 weights load as float32; their scales are no tensors of their own."""

    source: Checkpoint = field(kw_only=True)  # as stored
    scales: Mapping[str, str] = field(kw_only=True)  # of each fp8 weight, by its name
    read: "Callable[[Tensor], Tensor]" = field(kw_only=True)  # what is scaled, of an fp8 tensor: its numbers

    def load(self, name: str) -> "Tensor":
        tensor = self.source.load(name)
        if name not in self.scales:
            return tensor
        scale = self.source.load(self.scales[name]).float()
        return self.read(tensor) * _spread(scale, tensor.shape, self.scales[name], _block_of(self))

    def load_row(self, name: str, index: int) -> "Tensor":
        shape = self.tensors[name].shape
        if name not in self.scales:
            return self.source.load_row(name, index)
        if len(shape) < 3:  # rows of a matrix share the scales of their block
            return self.load(name)[index]
        row, scale = self.source.load_row(name, index), self.source.load(self.scales[name])
        if scale.numel() > 1 and len(scale) == shape[0]:
            scale = scale[index]
        return self.read(row) * _spread(scale.float(), row.shape, self.scales[name], _block_of(self))


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself if no weight of it is fp8 with a scale, or GGUF; else a view of it that reads float32."""
    if isinstance(checkpoint, GgufCheckpoint):
        return checkpoint.readable()
    scales = {
        name: name + suffix
        for name, info in checkpoint.tensors.items()
        for suffix in _SCALES
        if info.dtype == FP8 and name + suffix in checkpoint.tensors
    }
    if not scales:
        return checkpoint
    hidden = set(scales.values()) | {name.removesuffix("weight") + "input_scale" for name in scales}
    tensors = {
        name: replace(info, dtype="F32") if name in scales else info
        for name, info in checkpoint.tensors.items()
        if name not in hidden
    }
    return DequantizedCheckpoint(
        checkpoint.path, checkpoint.config, tensors, source=checkpoint, scales=scales, read=_numbers
    )


def fp8_ulps(checkpoint: Checkpoint) -> Checkpoint | None:
    """The same checkpoint with the ulp of each fp8 weight in its place, scaled as it is; None if no weight is fp8.

    checkpoint  as `dequantized` gives it. Weights that are ulps here say that they are of dtype FP8.
    """
    if not isinstance(checkpoint, DequantizedCheckpoint):
        return None
    tensors = {
        name: replace(info, dtype=FP8) if name in checkpoint.scales else info
        for name, info in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors, read=_ulps)


def _numbers(stored: "Tensor") -> "Tensor":
    return stored.float()


def _ulps(stored: "Tensor") -> "Tensor":
    """From each number to the next of its format, which has three bits after the leading one."""
    import torch

    smallest = 2.0**-6  # that has a leading one: below it numbers lie as far apart as just above
    exponents = torch.frexp(stored.float().abs().clamp_min(smallest)).exponent - 1  # of the power of two below
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents - 3)


def _block_of(checkpoint: Checkpoint) -> tuple[int, int]:
    said = (checkpoint.config.get("quantization_config") or {}).get("weight_block_size")
    return (int(said[0]), int(said[1])) if isinstance(said, list) and len(said) == 2 else _BLOCK


def _spread(scale: "Tensor", shape: tuple[int, ...], name: str, block: tuple[int, int]) -> "Tensor":
    """The scale of every element, by broadcasting or [out, in]. Raises CheckpointError if the shapes do not fit.

    Of experts fused in one tensor, whose number stands before the other sizes, likewise.
    """
    if scale.numel() == 1:
        return scale.reshape(())
    *experts, rows, columns = (1, *shape)[-max(2, len(shape)) :]
    if scale.dim() == 1 and len(scale) == rows and not experts:
        return scale[:, None]
    if tuple(scale.shape) in ((*experts, rows, 1), (*experts, 1, 1)):
        return scale
    if tuple(scale.shape) == (*experts, -(-rows // block[0]), -(-columns // block[1])):
        return scale.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]
    raise CheckpointError(
        f"{name} is {list(scale.shape)} for a weight of {list(shape)}",
        cause=f"it is no scale for a tensor, a channel or blocks of {block[0]} by {block[1]}",
        tensor=name,
    )
