"""What would be compiled and launched on an H100, where there is none."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from flora.kernels import RANK_LANES, SEGMENT_ROWS, AdapterWeights, Group, Place, WorkList


def pretend_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles for an H100 that is not there; nothing can be launched."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    h100 = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(driver, "_active", h100)


def launch_lora(
    layer: int, capacity: int, block_rows: int = SEGMENT_ROWS, *, factors: torch.dtype = torch.bfloat16
) -> None:
    """Launches shrink and expand of one layer's o projection as for an H100, for a list that has room for `capacity`
    rows; a decode step's, unless its segments may be longer. Tensors have no memory: for tests of what is launched.
    """
    from flora.kernels.triton_ops import TritonOps

    meta, layers, width = torch.device("meta"), 32, 4096

    def ints(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int32, device=meta)

    pool = torch.empty(64, 32768, dtype=factors, device=meta)
    weights = AdapterWeights(pool, ints(8, 64), ints(8, layers, 7, 3), torch.empty(8, layers, 7, device=meta), 2048)
    work = WorkList.build([], block_rows=block_rows, max_rank=512, capacity=capacity, device=meta)
    place = Place(layer, Group.OUT, (0,), (width,))
    x = torch.empty(capacity, width, dtype=torch.bfloat16, device=meta)
    ops = TritonOps(132, overlap=True)
    shrink = work
    if block_rows == SEGMENT_ROWS:
        room = capacity * RANK_LANES
        shrink = WorkList.build([], block_rows=block_rows, max_rank=512, capacity=room, shared=True, device=meta)
    ops.lora_expand(torch.empty_like(x), ops.lora_shrink(x, weights, place, shrink), weights, place, work)
