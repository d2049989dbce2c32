"""Tile sizes of the Triton kernels, as measured on an H100 (benchmarks/NOTES.md).

A grid depends on these, on capacities and on the number of multiprocessors, never on what a step holds, so a captured
CUDA graph stays right whatever its tables say at replay.
"""

from dataclasses import dataclass, field, replace
from functools import cache

import torch

from flora.kernels.work import RANK_BLOCK, SEGMENT_ROWS


@dataclass(frozen=True, slots=True)
class LoraTuning:
    """Shrink and expand, products of a tensor core both. The list's kind and its room decide which tiles they have and
    never how many rows a segment has, so nothing else in the batch changes a row's bits.
    """

    block_rank: int = RANK_BLOCK  # shrink fills v up to a multiple of it, so expand may read whole blocks
    split_elements: int = 2048  # of the input per partial sum; part of the rounding, so never by batch
    max_splits: int = 8  # split_elements doubles until they are no more
    shrink_block_k: int = 64  # input elements per step
    shrink_warps: int = 2
    shrink_stages: int = 5
    shrink_registers: int | None = None  # per thread; None leaves it to the compiler
    expand_width: int = 512  # outputs per program
    expand_narrow: int = 256  # where there would be fewer programs than multiprocessors can hold
    expand_crowd: int = 6  # programs a multiprocessor from which on there are enough
    expand_small_n: int = 128  # outputs per tensor core product: of ranks up to 16
    expand_middle_n: int = 128  # up to 32
    expand_large_n: int = 64
    expand_warps: int = 2
    expand_stages: int = 3
    expand_registers: int | None = 128  # per thread, for 16 warps a multiprocessor; None leaves it to the compiler
    programs_per_sm: int = 32  # of the persistent grid: many where they are small and a step has work for all

    def split_of(self, in_features: int) -> int:
        """Input elements per partial sum: at most max_splits of them cover in_features."""
        split = self.split_elements
        while in_features > split * self.max_splits:
            split *= 2
        return split


@dataclass(frozen=True, slots=True)
class DecodeTuning:
    split_tokens: int = 512  # of the context per partial result; part of the rounding, so never by batch
    whole_tokens: int = 768  # of a context that is not cut at all; by its own length, so never by batch either
    block_tokens: int = 64
    num_warps: int = 4
    num_stages: int = 2
    programs_per_sm: int = 8  # beside the one that each sequence and KV head has, for contexts of several parts

    @property
    def uncut_tokens(self) -> int:
        """Of the longest context that is one part."""
        return max(self.whole_tokens, self.split_tokens)


@dataclass(frozen=True, slots=True)
class PrefillTuning:
    block_rows: int = 128  # (token, query head) pairs of one KV head
    block_tokens: int = 64
    num_warps: int = 8
    num_stages: int = 5
    programs_per_sm: int = 4  # of the persistent grid
    max_head_bytes: int = 256  # of one head of one token; wider heads take WIDE_HEADS, which fits 227 KiB of smem


@dataclass(frozen=True, slots=True)
class MatmulTuning:
    """The one tile of row_matmul: part of the rounding, so never by the number of rows."""

    block_rows: int = 64
    block_outputs: int = 128
    block_k: int = 64
    band: int = 8
    num_warps: int = 4
    num_stages: int = 4


@dataclass(frozen=True, slots=True)
class OneRowTuning:
    block_elements: int = 4096  # of the weight per read of a program: 8 KiB in bf16, and as much again on its way
    num_warps: int = 4


WIDE_HEADS = PrefillTuning(block_rows=64, block_tokens=32, num_stages=2)


# A program waits for one read after another. Where few of them run, more that are shorter wait for less.


def _short_lora() -> LoraTuning:
    return LoraTuning(split_elements=512, max_splits=32, shrink_stages=8, expand_width=256, expand_narrow=64)


def _middle_lora() -> LoraTuning:
    return LoraTuning(split_elements=1024, shrink_registers=80)


def _wide_lora() -> LoraTuning:
    return LoraTuning(
        block_rank=64,
        split_elements=1024,
        max_splits=8,
        shrink_block_k=128,
        shrink_warps=4,
        shrink_stages=3,
        expand_width=256,
        expand_narrow=256,
        expand_crowd=0,
        expand_large_n=64,
        expand_warps=4,
        expand_stages=3,
        expand_registers=None,
        programs_per_sm=8,
    )


def _decode_lora() -> LoraTuning:
    return LoraTuning(shrink_registers=80)


SHORT_LIST, MIDDLE_LIST = 16, 64  # segments


@dataclass(frozen=True, slots=True)
class Tuning:
    lora: LoraTuning = field(default_factory=_decode_lora)  # lists of SEGMENT_ROWS per segment, decode's among them
    middle_lora: LoraTuning = field(default_factory=_middle_lora)  # those with room for MIDDLE_LIST segments at most
    short_lora: LoraTuning = field(default_factory=_short_lora)  # or SHORT_LIST: one stream, and a few
    wide_lora: LoraTuning = field(default_factory=_wide_lora)  # more rows per segment: prefill
    decode: DecodeTuning = field(default_factory=DecodeTuning)
    prefill: PrefillTuning = field(default_factory=PrefillTuning)

    def of_list(self, block_rows: int, room: int, *, are_fp8: bool = False) -> LoraTuning:
        """Of a list with room for so many segments of at most so many rows.

        are_fp8  the factors: half as many bytes an element
        """
        if block_rows > SEGMENT_ROWS:
            return self.wide_lora
        if room > MIDDLE_LIST:
            tuning = self.lora
        else:
            tuning = self.middle_lora if room > SHORT_LIST else self.short_lora
        return _for_bytes(tuning) if are_fp8 else tuning


@cache
def _for_bytes(tuning: LoraTuning) -> LoraTuning:
    """As many bytes a step of shrink as the factors' usual two an element make, and no more of them on their way."""
    stages = max(tuning.shrink_stages // 2 + 1, 3)
    return replace(tuning, shrink_block_k=2 * tuning.shrink_block_k, shrink_stages=stages)


def overlapped(overlap: bool) -> dict[str, bool]:
    """Options of a launch that may start while the one before it on the stream ends."""
    return {"OVERLAP": overlap, **({"launch_pdl": True} if overlap else {})}  # the interpreter knows no launch_pdl


@cache
def can_overlap(device: torch.device) -> bool:
    """Whether a launch may start while the one before it ends: Hopper and later."""
    return torch.cuda.get_device_properties(device).major >= 9


def grid_size(items: int, programs_per_sm: int, num_sms: int) -> int:
    """One program per item, up to a persistent grid that walks over the rest."""
    return min(items, programs_per_sm * num_sms)
