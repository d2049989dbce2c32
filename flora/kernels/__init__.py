"""Operations of the forward pass that know pages and ids, and no names: LoRA, paged attention, and what lies between.

`ReferenceOps` is plain torch, the ground truth and the CPU path. `TritonOps` runs on a GPU; it is imported on first
use, so that a machine without Triton can import this room.
"""

from typing import Any

from flora.kernels.context import Context
from flora.kernels.linear import MIN_ROWS, PackedLinear, linear
from flora.kernels.modules import (
    ALL_GROUPS,
    ATTENTION_GROUPS,
    CHUNK,
    MODULES,
    Group,
    Place,
    matrix_alignment,
    padded,
    row_alignment,
)
from flora.kernels.ops import Ops
from flora.kernels.pointwise import rms_norm, rope, silu_mul
from flora.kernels.project import SideStream, project, project_beside
from flora.kernels.reference import ReferenceOps
from flora.kernels.terms import LowRankTerms
from flora.kernels.weights import AdapterWeights
from flora.kernels.work import (
    RANK_LANES,
    SEGMENT_ROWS,
    LoraWork,
    Segment,
    Share,
    WorkList,
    cut_runs,
    share_ranks,
    split_segments,
)

__all__ = [
    "ALL_GROUPS",
    "ATTENTION_GROUPS",
    "CHUNK",
    "MIN_ROWS",
    "MODULES",
    "RANK_LANES",
    "SEGMENT_ROWS",
    "AdapterWeights",
    "Context",
    "Group",
    "LoraWork",
    "LowRankTerms",
    "Ops",
    "PackedLinear",
    "Place",
    "ReferenceOps",
    "Segment",
    "Share",
    "SideStream",
    "WorkList",
    "cut_runs",
    "linear",
    "matrix_alignment",
    "padded",
    "project",
    "project_beside",
    "rms_norm",
    "rope",
    "row_alignment",
    "share_ranks",
    "silu_mul",
    "split_segments",
]


def __getattr__(name: str) -> Any:
    if name == "TritonOps":
        from flora.kernels.triton_ops import TritonOps

        return TritonOps
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
