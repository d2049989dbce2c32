"""What another engine's LoRA kernels are given in bench_kernels.py: adapters in slots of the highest rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class NoPeer(Exception):
    """It cannot be imported here, or another version than this was written for takes other arguments."""


@dataclass(frozen=True, slots=True)
class SlottedModule:
    """One fused projection of one layer: its slices' factors, a slot for each adapter, filled up with zeros."""

    ranks: Sequence[int]  # of the slots' adapters
    a: list[Tensor]  # [slots, rank, in_features]
    b: list[Tensor]  # [slots, out_features, rank]


class PeerLora(Protocol):
    """Shrink and expand of another engine, over rows that want given slots."""

    version: str

    def packed(self, module: SlottedModule, num_rows: int) -> Any:
        """The module as this engine keeps it, with what its kernels need besides; made before anything is timed."""
        ...

    def add(self, y: Tensor, x: Tensor, packed: Any) -> None:
        """y += x A^T B^T for each row's adapter, slices side by side.  y [rows, sum of outs], x [rows, in_features]"""
        ...


def slotted_module(
    ranks: Sequence[int], in_features: int, out_sizes: Sequence[int], dtype: torch.dtype, device: torch.device
) -> SlottedModule:
    """Random factors of these ranks, one adapter a slot."""
    highest = max(ranks)
    module = SlottedModule(ranks, [], [])
    kept = torch.tensor([[j < rank for j in range(highest)] for rank in ranks], device=device)  # [slots, rank]
    for size in out_sizes:
        a = torch.randn(len(ranks), highest, in_features, device=device) * 0.02
        b = torch.randn(len(ranks), size, highest, device=device) * 0.02
        module.a.append((a * kept[:, :, None]).to(dtype))
        module.b.append((b * kept[:, None, :]).to(dtype))
    return module


def expected(y: Tensor, x: Tensor, module: SlottedModule, slots: Sequence[int]) -> Tensor:
    """The same in float32."""
    out, rows = y.float().clone(), torch.tensor(slots, device=x.device)
    start = 0
    for a, b in zip(module.a, module.b, strict=True):
        v = torch.bmm(a[rows].float(), x.float()[:, :, None])
        out[:, start : start + b.shape[1]] += torch.bmm(b[rows].float(), v)[:, :, 0]
        start += b.shape[1]
    return out
