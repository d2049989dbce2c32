"""A step's integers in one buffer: filled by numpy in pinned memory, brought to the device by one copy.

Every array has room for the largest step and a fixed place, so a captured graph reads the next step's values where it
read the last one's.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flora.kernels import RANK_LANES, SEGMENT_ROWS
from flora.serve.engine.batch import JOINT_ROWS, PREFILL_BLOCK_ROWS

Arrays = dict[str, NDArray[Any]]
_ALIGN = 256  # bytes between arrays: any view of any of them is then aligned for vector loads


@dataclass(frozen=True, slots=True)
class InputSizes:
    """The largest step."""

    rows: int  # tokens
    sequences: int
    table_pages: int  # width of the block table

    def joint_segments(self, rows: int) -> int:
        """Of a step of so many rows whose prompts share the lists of rows that decode: the whole ones, and one for each
        sequence that is not.
        """
        return min(rows, self.sequences) + rows // SEGMENT_ROWS

    @property
    def prefill_segments(self) -> int:
        return self.sequences + self.rows // PREFILL_BLOCK_ROWS

    def fields(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        i32, i64 = np.dtype(np.int32), np.dtype(np.int64)
        segments = max(self.sequences, self.joint_segments(min(JOINT_ROWS, self.rows)))
        return {
            "token_ids": (i64, (self.rows,)),  # PENDING: the token that lies in the row's lane
            "lanes": (i64, (self.rows,)),  # of the row's sequence
            "positions": (i64, (self.rows,)),
            "slots": (i64, (self.rows,)),
            "adapter_rows": (i32, (self.rows,)),  # 1: has an adapter
            "logits_rows": (i64, (self.sequences,)),
            "sampled_lanes": (i64, (self.sequences,)),
            "seq_lens": (i32, (self.sequences,)),
            "query_starts": (i32, (self.sequences + 1,)),
            "shrink_segments": (i32, (segments * RANK_LANES, 4)),
            "num_shrink_segments": (i32, (1,)),
            "expand_segments": (i32, (segments, 3)),
            "num_expand_segments": (i32, (1,)),
            "prefill_segments": (i32, (self.prefill_segments, 3)),
            "num_prefill_segments": (i32, (1,)),
            "prefill_range": (i32, (2,)),
            "block_tables": (i32, (self.sequences, self.table_pages)),
        }


class StepInputs:
    """The arrays on the device, and as many host copies of them as steps may be under way."""

    def __init__(self, sizes: InputSizes, device: torch.device, num_hosts: int = 3) -> None:
        self.sizes = sizes
        self._places: dict[str, tuple[int, np.dtype, tuple[int, ...]]] = {}
        offset = 0
        for name, (dtype, shape) in sizes.fields().items():
            self._places[name] = (offset, dtype, shape)
            offset += -(-prod(shape) * dtype.itemsize // _ALIGN) * _ALIGN
        self._device = torch.zeros(offset, dtype=torch.uint8, device=device)
        pinned = device.type == "cuda"
        self._hosts = [torch.zeros(offset, dtype=torch.uint8, pin_memory=pinned) for _ in range(num_hosts)]
        self._host_arrays = [self._numpy_views(host) for host in self._hosts]
        self.device = {name: self._device_view(name) for name in self._places}
        self._next = 0

    def begin(self) -> Arrays:
        """The next host copy's arrays, to be filled. Its last use was `num_hosts` steps ago."""
        self._next = (self._next + 1) % len(self._hosts)
        return self._host_arrays[self._next]

    def send(self) -> None:
        """Copies what was filled to the device, in stream order."""
        self._device.copy_(self._hosts[self._next], non_blocking=True)

    def _device_view(self, name: str) -> Tensor:
        offset, dtype, shape = self._places[name]
        end = offset + prod(shape) * dtype.itemsize
        return self._device[offset:end].view(torch.int64 if dtype == np.int64 else torch.int32).view(shape)

    def _numpy_views(self, host: Tensor) -> Arrays:
        flat = host.numpy()
        return {
            name: flat[offset : offset + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
            for name, (offset, dtype, shape) in self._places.items()
        }
