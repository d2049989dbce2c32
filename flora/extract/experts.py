"""Experts that a checkpoint keeps fused in one tensor, read as one matrix [out, in] each.

    gpt-oss, Llama 4, Aria             M.experts.LEAF [experts, in, out]
    Qwen3-VL                           either, as it was saved by transformers 4 or 5
    others                             M.experts.LEAF [experts, out, in], if the shapes say so
    Granite                            M.input_linear.weight, M.output_linear.weight [experts, out, in]
    JetMoE                             the same, and in its attention, too: LEAF is input_linear or output_linear
    gpt-oss in MXFP4                   M.experts.LEAF_blocks [experts, out, in / 32, 16]
                                       M.experts.LEAF_scales [experts, out, in / 32]

LEAF is gate_up_proj or down_proj where nothing else is said, and expert 3 is the tensor `M.experts.3.LEAF.weight`, as
where each has its own.

MXFP4 (OCP Microscaling): a byte holds two numbers of four bits, the even one low; 32 of them share one exponent.
Every such number times its power of two is exact in float32.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from flora.checkpoint import Checkpoint, TensorInfo
from flora.errors import CheckpointError
from flora.extract.dequantize import dequantized
from flora.forms import STACKS, Kind

if TYPE_CHECKING:
    from torch import Tensor

LAYOUTS: Mapping[str, Kind] = {  # by model_type, where names or classes are not what transformers 5 makes of most
    "gpt_oss": "expert_transposed",
    "openai_privacy_filter": "expert_transposed",
    "llama4": "expert_transposed",
    "llama4_text": "expert_transposed",
    "aria": "expert_transposed",
    "aria_text": "expert_transposed",
    "granitemoe": "expert",
    "granitemoeshared": "expert",
    "granitemoehybrid": "expert",
    "jetmoe": "expert",
}
_LEAVES = ("gate_up_proj", "down_proj")
_OWN_LEAVES = {"jetmoe": ("input_linear", "output_linear")}  # where transformers 5 keeps them in modules of their own
_EITHER = ("qwen3_vl_moe", "qwen3_vl_moe_text")
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # e2m1; the eight above are the same below zero
_BIAS = 127  # of the exponents that scales are


@dataclass(frozen=True, slots=True)
class Expert:
    """Where one expert's matrix lies."""

    stored: tuple[str, ...]  # the tensor of all experts; or MXFP4's blocks and scales
    index: int
    kind: Kind
    num_experts: int


@dataclass(frozen=True, eq=False)
class UnfusedCheckpoint(Checkpoint):
    """A checkpoint whose fused experts are tensors [out, in] of their own."""

    source: Checkpoint = field(kw_only=True)  # as stored, but for fp8
    experts: Mapping[str, Expert] = field(kw_only=True)  # by the names that this view gives them

    def load(self, name: str) -> "Tensor":
        expert = self.experts.get(name)
        if expert is None:
            return self.source.load(name)
        parts = [self.source.load_row(stored, expert.index) for stored in expert.stored]
        if len(parts) == 2:
            return _decode(*parts)
        return parts[0].T if expert.kind == "expert_transposed" else parts[0]


def readable(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as extraction reads it: quantized weights as their numbers, fused experts one by one."""
    return unfused(dequantized(checkpoint))


def unfused(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself if nothing in it is known to be fused experts; else a view with one tensor an expert."""
    model_type = str(checkpoint.config.get("model_type"))
    tensors, experts = dict(checkpoint.tensors), {}
    for name in checkpoint.tensors:
        place = _place(name, _OWN_LEAVES.get(model_type, _LEAVES))
        if place is None or len(tensors[name].shape) < 3:  # a shared expert is a plain layer of such a name
            continue
        parent, leaf = place
        stored: tuple[str, ...] = (name,)
        if model_type in _EITHER:
            layout = _as_transformers_reads(tensors[name].shape, leaf, checkpoint.config)
        else:
            layout = LAYOUTS.get(model_type) or _as_most_lie(parent, checkpoint.tensors)
        if layout is None:
            continue
        infos = _split(tensors[name], layout)
        if name.endswith("_blocks"):
            scales = name.removesuffix("blocks") + "scales"
            _check_blocks(checkpoint.tensors, name, scales)
            del tensors[scales]
            stored = (name, scales)
        del tensors[name]
        for index, info in enumerate(infos):
            own = f"{parent}.experts.{index}.{leaf}.weight"
            tensors[own] = replace(info, name=own)
            experts[own] = Expert(stored, index, layout, len(infos))
    if not experts:
        return checkpoint
    tensors = {name: tensors[name] for name in sorted(tensors)}
    return UnfusedCheckpoint(checkpoint.path, checkpoint.config, tensors, source=checkpoint, experts=experts)


def expert_of(checkpoint: Checkpoint, name: str) -> Expert | None:
    """Where the tensor lies among others of its kind, if it does."""
    return checkpoint.experts.get(name) if isinstance(checkpoint, UnfusedCheckpoint) else None


def stored_names(checkpoint: Checkpoint, name: str) -> tuple[str, ...]:
    """The tensors of the files that the tensor is read from."""
    expert = expert_of(checkpoint, name)
    return (name,) if expert is None else expert.stored


def _place(name: str, leaves: Iterable[str]) -> tuple[str, str] | None:
    """M and LEAF of the name of a tensor of fused experts."""
    for leaf in leaves:
        for place in STACKS[leaf]:
            if name.endswith(f".{place}"):
                return name.removesuffix(f".{place}"), leaf
    return None


def _as_transformers_reads(shape: tuple[int, ...], leaf: str, config: Mapping[str, Any]) -> Kind | None:
    """How the experts lie where versions of transformers differ: as version 5 has it if the shape is that."""
    sizes = config.get("text_config") or config
    hidden, width = sizes.get("hidden_size"), sizes.get("moe_intermediate_size")
    if not isinstance(hidden, int) or not isinstance(width, int):
        return None
    own = (2 * width, hidden) if leaf == "gate_up_proj" else (hidden, width)
    return "expert" if shape[1:] == own else "expert_transposed"


def _as_most_lie(parent: str, tensors: Mapping[str, TensorInfo]) -> Kind | None:
    """`expert` if M's two tensors are called and shaped as transformers 5 has them for most families, else None.

    gate_up_proj is [2 * width, hidden] of each, and down_proj [hidden, width].
    """
    shapes = [tensors[name].shape for leaf in _LEAVES if (name := f"{parent}.experts.{leaf}") in tensors]
    if [len(shape) for shape in shapes] != [3, 3]:
        return None
    (_, *wide), (_, *narrow) = shapes
    return "expert" if wide == [2 * narrow[1], narrow[0]] else None


def _split(info: TensorInfo, kind: Kind) -> list[TensorInfo]:
    """One entry an expert, with the bytes that are its own."""
    num_experts, *shape = info.shape
    if info.name.endswith("_blocks"):
        dtype, (out_features, *rest) = "F32", shape
        matrix = (out_features, 32 * rest[0]) if len(rest) == 2 and rest[1] == 16 else None
    else:
        dtype, matrix = info.dtype, (shape[0], shape[1]) if len(shape) == 2 else None
    if matrix is None:
        raise CheckpointError(
            f"{info.name} of {info.file} is {list(info.shape)}, which is no matrix for each of several experts",
            cause="Flora knows the experts of this architecture as one tensor of three dimensions, or as MXFP4",
            fix="leave them out with --exclude '*.experts.*', or give the checkpoint as transformers saves it",
            tensor=info.name,
        )
    if kind == "expert_transposed" and dtype == info.dtype:
        matrix = matrix[1], matrix[0]
    step = info.num_bytes // max(1, num_experts)
    return [
        replace(info, dtype=dtype, shape=matrix, start=info.start + step * index, end=info.start + step * (index + 1))
        for index in range(num_experts)
    ]


def _check_blocks(tensors: Mapping[str, TensorInfo], blocks: str, scales: str) -> None:
    if scales not in tensors or tensors[scales].shape != tensors[blocks].shape[:-1]:
        found = list(tensors[scales].shape) if scales in tensors else "not there"
        raise CheckpointError(
            f"{scales} is {found}; blocks of {list(tensors[blocks].shape)} want {list(tensors[blocks].shape[:-1])}",
            cause="MXFP4 weights are read with one scale for each block of 32",
            fix="fetch the folder again",
            tensor=scales,
        )


def _decode(blocks: "Tensor", scales: "Tensor") -> "Tensor":
    """Float32 [out, in] of one expert's bytes [out, in / 32, 16] and exponents [out, in / 32]."""
    import torch

    numbers, codes = torch.tensor((*_FP4, *(-value for value in _FP4))), torch.arange(256)
    # a byte's two numbers as one integer of 64 bits: one look-up for both takes a fifth of the time
    pairs = torch.stack((numbers[codes & 15], numbers[codes >> 4]), -1).view(torch.int64).flatten()
    found = pairs.index_select(0, blocks.flatten().to(torch.int32)).view(torch.float32)
    scale = torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.to(torch.int32) - _BIAS)
    return found.view(*scales.shape, 32).mul_(scale[..., None]).flatten(1)
