"""Tile sizes of the Triton kernels, as measured on an H100 (benchmarks/NOTES.md).

A grid depends on these, on capacities and on the number of multiprocessors, never on what a step holds, so a captured
CUDA graph stays right whatever its tables say at replay.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ShrinkTuning:
    split_elements: int = 1024  # of the input per partial sum; part of the result's rounding, so never by batch
    block_k: int = 128
    block_rank: int = 16
    rank_lanes: int = 4  # a rank-64 slice is then as parallel as four rank-16 ones
    num_warps: int = 4
    num_stages: int = 5
    programs_per_sm: int = 32


@dataclass(frozen=True, slots=True)
class ExpandTuning:
    block_n: int = 256
    block_rank: int = 16
    num_warps: int = 8
    num_stages: int = 3
    programs_per_sm: int = 32


@dataclass(frozen=True, slots=True)
class DecodeTuning:
    split_tokens: int = 512  # of the context per partial result; part of the rounding, so never by batch
    block_tokens: int = 64
    split_lanes: int = 16  # programs per (sequence, KV head); each takes every 16th split
    num_warps: int = 4
    num_stages: int = 5


@dataclass(frozen=True, slots=True)
class PrefillTuning:
    block_rows: int = 128  # (token, query head) pairs of one KV head
    block_tokens: int = 64
    num_warps: int = 8
    num_stages: int = 3


@dataclass(frozen=True, slots=True)
class Tuning:
    shrink: ShrinkTuning = field(default_factory=ShrinkTuning)
    expand: ExpandTuning = field(default_factory=ExpandTuning)
    decode: DecodeTuning = field(default_factory=DecodeTuning)
    prefill: PrefillTuning = field(default_factory=PrefillTuning)


def grid_size(items: int, programs_per_sm: int, num_sms: int) -> int:
    """One program per item, up to a persistent grid that walks over the rest."""
    return min(items, programs_per_sm * num_sms)
