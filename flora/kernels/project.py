"""A base product and the low-rank terms of its rows' adapters: added to it at once, or left beside it for its reader.

Beside the product, shrink and expand run on a second stream of the GPU and write a buffer of their own. Whoever reads
the product next (rotation, activation, the sum before the norm) adds the two, on rows that have an adapter. Nothing of
LoRA is then left on the critical path but the longer of the two roads.
"""

from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

from flora.kernels.linear import PackedLinear
from flora.kernels.modules import Place
from flora.kernels.ops import Ops
from flora.kernels.terms import LowRankTerms
from flora.kernels.weights import AdapterWeights
from flora.kernels.work import LoraWork


class SideStream:
    """A second stream of one GPU. What is launched within it runs beside what is launched after it, until `join`.

    A step's graph captures both. Elsewhere, in the interpreter, launches have one order anyway. Enter it before the
    product is launched: cuBLAS's programs leave no room on a multiprocessor, and what comes after them waits to their
    end.

    urgent  its programs take places before those of the product. Worth it where those are small and leave theirs often,
            as one_row's do; beside cuBLAS's it is slower (benchmarks/NOTES.md).
    """

    def __init__(self, device: torch.device, *, urgent: bool = False) -> None:
        priority = -1 if urgent else 0
        self._stream = torch.cuda.Stream(device, priority=priority) if device.type == "cuda" else None
        self._entered: torch.cuda.StreamContext | None = None

    def __enter__(self) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            self._entered = torch.cuda.stream(self._stream)
            self._entered.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._entered is not None:
            self._entered.__exit__(kind, error, trace)
            self._entered = None

    def join(self) -> None:
        """What is launched after this waits for what was launched within."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


def project(
    ops: Ops,
    linear: PackedLinear,
    x: Tensor,
    adapters: AdapterWeights,
    place: Place,
    work: Sequence[LoraWork],
    side: SideStream | None = None,
) -> Tensor:
    """linear(x) with each row's low-rank terms added, [n, out_total].

    x     [n, in_features]
    side  where the second of two is computed, beside the first: no row is in both
    """
    y: Tensor = linear(x)

    def add(rows: LoraWork) -> None:
        ops.lora_expand(y, ops.lora_shrink(x, adapters, place, rows.shrink), adapters, place, rows.expand)

    if side is None or len(work) != 2:
        for rows in work:
            add(rows)
        return y
    with side:
        add(work[1])
    add(work[0])
    side.join()
    return y


def project_beside(
    ops: Ops,
    side: SideStream,
    linear: PackedLinear,
    x: Tensor,
    adapters: AdapterWeights,
    place: Place,
    work: Sequence[LoraWork],
    adapter_rows: Tensor,
) -> tuple[Tensor, LowRankTerms]:
    """linear(x), and the terms that it lacks.

    adapter_rows  int32 [n]: not 0 where a row has an adapter, which is then in one of `work`'s segments
    """
    # Taken on the stream that will read them, which waits for the side stream before it takes anything else.
    values = torch.empty(len(x), linear.out_features, dtype=x.dtype, device=x.device)
    with side:
        for rows in work:
            v = ops.lora_shrink(x, adapters, place, rows.shrink)
            ops.lora_expand(values, v, adapters, place, rows.expand, add=False)
    y: Tensor = linear(x, early=False)
    side.join()
    return y, LowRankTerms(values, adapter_rows)
