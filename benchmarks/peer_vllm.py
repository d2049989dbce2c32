"""vLLM's Triton LoRA kernels, where vLLM 0.26 can be imported.

Its shrink and expand run over a batch's rows sorted by adapter, all slices of a fused projection in one launch.
"""

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import torch
from peer_kernels import NoPeer, SlottedModule
from torch import Tensor


class VllmLora:
    """See PeerLora."""

    def __init__(self, slots: Sequence[int], num_slots: int, device: torch.device) -> None:
        """slots  of each row. Raises NoPeer."""
        try:
            from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

            self.version = importlib.metadata.version("vllm")
            self._shrink, self._expand = lora_shrink, lora_expand
            self._meta: Any = LoRAKernelMeta.make(num_slots, len(slots), device=device)
            self._meta.prepare_tensors(torch.tensor(slots, device=device))
            self._arguments = self._meta.meta_args(len(slots), False)
        except (ImportError, AttributeError, TypeError, RuntimeError) as error:
            raise NoPeer(repr(error)) from error

    def packed(self, module: SlottedModule, num_rows: int) -> tuple[SlottedModule, Tensor]:
        """The module as it is, and the float32 [slices, rows, rank] between the kernels."""
        rank, device = module.a[0].shape[1], module.a[0].device
        return module, torch.zeros(len(module.a), num_rows, rank, device=device)

    def add(self, y: Tensor, x: Tensor, packed: tuple[SlottedModule, Tensor]) -> None:
        """See PeerLora.add."""
        module, buffer = packed
        self._shrink(x, module.a, buffer, *self._arguments, 1.0)
        self._expand(buffer, module.b, y, *self._arguments, offset_start=0, add_inputs=True)
