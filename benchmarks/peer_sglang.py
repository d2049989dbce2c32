"""SGLang's LoRA kernels of its default backend (chunked SGMV), from the files of its 0.5.23 wheel.

Of the engine only these files are imported: the rest needs CUDA libraries that a benchmark machine may lack. What they
import of it is one cache for launches, which a captured graph has no use of, and two names of types and settings.
"""

import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from peer_kernels import NoPeer, SlottedModule
from torch import Tensor

CHUNK_ROWS = 16  # of one segment: the server's default for --max-lora-chunk-size
_KERNELS = "sglang.kernels.ops.lora.dense"


class SglangLora:
    """See PeerLora."""

    def __init__(self, folder: Path, slots: Sequence[int], ranks: Sequence[int], device: torch.device) -> None:
        """folder  where the wheel was unpacked
        slots   of each row, those with one adapter side by side;  ranks  of the slots' adapters
        Raises NoPeer.
        """
        try:
            _stand_in_for_the_rest(folder)
            self._shrink = importlib.import_module(f"{_KERNELS}.chunked_sgmv_shrink").chunked_sgmv_lora_shrink_forward
            self._expand = importlib.import_module(f"{_KERNELS}.chunked_sgmv_expand").chunked_sgmv_lora_expand_forward
            self.version = next(d.version for d in importlib.metadata.distributions(name="sglang", path=[str(folder)]))
        except (ImportError, AttributeError, OSError, StopIteration) as error:
            raise NoPeer(repr(error)) from error
        starts = [
            row
            for row, slot in enumerate(slots)
            if row == 0 or slot != slots[row - 1] or (row - slots.index(slot)) % CHUNK_ROWS == 0
        ]

        def integers(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        self._batch = SimpleNamespace(
            use_cuda_graph=False,
            num_segments=len(starts),
            max_len=CHUNK_ROWS,
            seg_indptr=integers([*starts, len(slots)]),
            weight_indices=integers([slots[row] for row in starts]),
            permutation=integers(range(len(slots))),
            lora_ranks=integers(ranks),
            scalings=torch.ones(len(ranks), device=device),
        )

    def packed(self, module: SlottedModule, num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A [slots, slices * rank, in], an adapter's slices end to end; B [slots, sum of outs, rank]; and where slices
        start, on the device and on the CPU.
        """
        slots, rank, in_features = module.a[0].shape
        a = torch.zeros(slots, len(module.a) * rank, in_features, dtype=module.a[0].dtype, device=module.a[0].device)
        for slot, own in enumerate(module.ranks):
            for i, factor in enumerate(module.a):
                a[slot, i * own : (i + 1) * own] = factor[slot, :own]
        ends = torch.tensor([0, *(b.shape[1] for b in module.b)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return a, torch.cat(module.b, dim=1).contiguous(), ends.to(a.device), ends

    def add(self, y: Tensor, x: Tensor, packed: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        """See PeerLora.add."""
        a, b, ends, ends_on_cpu = packed
        v = self._shrink(x=x, weights=a, batch_info=self._batch, num_slices=len(ends) - 1)
        largest = int(ends_on_cpu.diff().max())
        self._expand(
            x=v,
            weights=b,
            batch_info=self._batch,
            slice_offsets=ends,
            slice_offsets_cpu=ends_on_cpu,
            max_slice_size=largest,
            base_output=y,
        )


def _stand_in_for_the_rest(folder: Path) -> None:
    """Packages that lead to the kernels' files without running any other."""
    for name in ("sglang", "sglang.kernels", "sglang.kernels.ops", "sglang.kernels.ops.lora", _KERNELS):
        package = ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = package
    off = SimpleNamespace(get=bool)  # False: a server's own choices
    names: dict[str, dict[str, Any]] = {
        "sglang.srt": {},
        "sglang.srt.lora": {},
        "sglang.srt.environ": {
            "envs": SimpleNamespace(SGLANG_ENABLE_LORA_CSGMV_SPLIT_K=off, SGLANG_ENABLE_DETERMINISTIC_INFERENCE=off)
        },
        "sglang.srt.lora.utils": {"LoRABatchInfo": SimpleNamespace},
        "sglang.srt.utils": {
            "cached_triton_kernel": lambda key: lambda kernel: kernel,
            "get_device_name": lambda: torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
    }
    for name, values in names.items():
        module = ModuleType(name)
        vars(module).update(values)
        sys.modules[name] = module
