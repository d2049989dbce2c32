"""Shrink and expand with the same adapters in fp8: their errors, and their times beside those of bf16."""

import dataclasses

import torch
from kernel_lora import check_lora, lora_bytes, lora_inputs, lora_step
from kernel_world import ALL, QKVO, RANKS, Bench, decode_work

from flora.kernels import AdapterWeights
from flora.kernels.triton_ops import TritonOps

POWER = 12  # of two: brings the random factors to the middle of fp8's range


def in_fp8(weights: AdapterWeights) -> AdapterWeights:
    """The same adapters, rounded."""
    pool = torch.empty(weights.pool.shape, dtype=torch.float8_e4m3fn, device=weights.pool.device)
    for narrow, wide in zip(pool.split(8192), weights.pool.split(8192), strict=True):
        narrow.copy_((wide.float() * 2.0**POWER).clamp(-448, 448))
    return dataclasses.replace(weights, pool=pool, scales=weights.scales * 4.0**-POWER)


def bench_fp8(bench: Bench, ops: TritonOps, weights: AdapterWeights, ranks: list[int]) -> None:
    """Each row with an adapter of its own, and four adapters for all of them; bytes of true ranks, one a number."""
    narrow, layers, n = in_fp8(weights), weights.modules.shape[1], len(ranks)
    for rows_each in (1, 20):
        check_lora(bench, ops, narrow, ranks, rows_each, name="lora fp8")
    data = lora_inputs(bench, n, ALL)
    few = [ranks.index(rank) for rank in RANKS]
    cases = (("distinct", list(range(n)), 1), ("four adapters", few, n // len(few)))
    for case, slots, rows_each in cases:
        work = decode_work(bench, slots, rows_each, ranks)
        for modules, groups in (("q,k,v,o", QKVO), ("all seven", ALL)):
            seconds = {
                name: bench.seconds(lora_step(bench, ops, factors, groups, work, data))
                for name, factors in (("bf16", weights), ("fp8", narrow))
            }
            read = sum(lora_bytes(bench.model, [ranks[slot] for slot in slots], groups, layers)) / 2
            bench.record(
                op="lora fp8", case=case, modules=modules, adapters=len(slots),
                us_per_layer=seconds["fp8"] / layers * 1e6, over_bf16=seconds["fp8"] / seconds["bf16"],
                tb_s=read / seconds["fp8"] / 1e12,
            )  # fmt: skip
