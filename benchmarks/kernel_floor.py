"""What shrink and expand are held against: a kernel that reads as many bytes in as many launches, and does no more."""

import triton
import triton.language as tl
from kernel_lora import lora_bytes
from kernel_world import ALL, QKVO, Bench, Step
from torch import Tensor

from flora.kernels import AdapterWeights

BLOCK = 2048  # elements of a program: 4 KiB, as an item of expand; other sizes read as fast
NEVER = 12345.678  # no sum is


def read_step(pool: Tensor, launches: list[int]) -> Step:
    """Reads so many bytes of the pool in each launch, part after part: none finds what it reads in the cache."""
    flat = pool.view(-1)
    programs = [num_bytes // (BLOCK * pool.element_size()) for num_bytes in launches]

    def step() -> None:
        first = 0
        for count in programs:
            _read_kernel[(count,)](flat[first * BLOCK :], flat, NEVER, BLOCK=BLOCK, num_warps=1)
            first = (first + count) % (len(flat) // BLOCK - max(programs))

    return step


def bench_floor(bench: Bench, weights: AdapterWeights, ranks: list[int]) -> None:
    """Launches as bench_lora's: A of a group, then B of it."""
    layers = weights.modules.shape[1]
    for modules, groups in (("q,k,v,o", QKVO), ("all seven", ALL)):
        launches = [part for group in groups for part in lora_bytes(bench.model, ranks, (group,), 1)]
        seconds = bench.seconds(read_step(weights.pool, launches * layers))
        us, rate = seconds / layers * 1e6, sum(launches) * layers / seconds / 1e12
        bench.record(op="plain read", modules=modules, adapters=len(ranks), us_per_layer=us, tb_s=rate)


@triton.jit
def _read_kernel(p, p_out, never, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    b = tl.load(p + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    total = tl.sum(b.to(tl.float32))
    if total == never:  # the compiler would leave out a read that nothing depends on
        tl.store(p_out, total.to(p_out.dtype.element_ty))
