"""vLLM's Triton LoRA kernels at the shapes of bench_kernels.py, where vLLM can be imported.

vLLM keeps adapters in slots of the highest rank, one tensor for each module and layer; its shrink and expand run over a
batch's rows sorted by adapter, all slices of a fused projection in one launch.
"""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class NoVllm(Exception):
    """It cannot be imported here, or another version than this was written for (0.26.0) takes other arguments."""


@dataclass
class SlottedModule:
    """One fused projection of one layer: its slices' factors, a slot for each adapter, filled up with zeros."""

    a: list[Tensor]  # [slots, rank, in_features]
    b: list[Tensor]  # [slots, out_features, rank]


def slotted_module(
    ranks: Sequence[int], in_features: int, out_sizes: Sequence[int], dtype: torch.dtype, device: torch.device
) -> SlottedModule:
    """Random factors of these ranks, one adapter a slot."""
    highest = max(ranks)
    module = SlottedModule([], [])
    kept = torch.tensor([[j < rank for j in range(highest)] for rank in ranks], device=device)  # [slots, rank]
    for size in out_sizes:
        a = torch.randn(len(ranks), highest, in_features, device=device) * 0.02
        b = torch.randn(len(ranks), size, highest, device=device) * 0.02
        module.a.append((a * kept[:, :, None]).to(dtype))
        module.b.append((b * kept[:, None, :]).to(dtype))
    return module


class VllmLora:
    """vLLM's two kernels over rows that want these adapters."""

    def __init__(self, slots: Sequence[int], num_slots: int, device: torch.device) -> None:
        """slots  of each row. Raises NoVllm."""
        try:
            from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

            self.version = importlib.metadata.version("vllm")
            self._shrink, self._expand = lora_shrink, lora_expand
            self._meta: Any = LoRAKernelMeta.make(num_slots, len(slots), device=device)
            self._meta.prepare_tensors(torch.tensor(slots, device=device))
            self._arguments = self._meta.meta_args(len(slots), False)
        except (ImportError, AttributeError, TypeError, RuntimeError) as error:
            raise NoVllm(repr(error)) from error

    def add(self, y: Tensor, x: Tensor, module: SlottedModule, buffer: Tensor) -> None:
        """y += x A^T B^T for each row's adapter, slices side by side.

        y       [rows, sum of out_sizes];  x  [rows, in_features]
        buffer  float32 [slices, rows, rank]
        """
        self._shrink(x, module.a, buffer, *self._arguments, 1.0)
        self._expand(buffer, module.b, y, *self._arguments, offset_start=0, add_inputs=True)


def expected(y: Tensor, x: Tensor, module: SlottedModule, slots: Sequence[int]) -> Tensor:
    """The same in float32."""
    out, rows = y.float(), torch.tensor(slots, device=x.device)
    start = 0
    for a, b in zip(module.a, module.b, strict=True):
        v = torch.bmm(a[rows].float(), x.float()[:, :, None])
        out[:, start : start + b.shape[1]] += torch.bmm(b[rows].float(), v)[:, :, 0]
        start += b.shape[1]
    return out
