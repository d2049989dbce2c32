"""Tilings tried one after another, each on top of what has helped so far."""

import dataclasses
from collections.abc import Iterator, Sequence

import triton
from kernel_attention import attention_step, contexts_in_a_run
from kernel_lora import lora_cases, lora_inputs, lora_step
from kernel_world import ALL, QKVO, Bench

from flora.kernels import AdapterWeights, Ops
from flora.kernels.triton_ops import TritonOps


def variants() -> Iterator[tuple[str, dict[str, int | None]]]:
    """The tilings that are tried around the defaults of flora/kernels/tuning.py, which are the winners so far."""
    for part in ("lora", "wide_lora", "decode", "prefill"):
        yield part, {}
    yield "lora", {"shrink_warps": 1}
    yield "lora", {"shrink_warps": 4}
    yield "lora", {"shrink_block_k": 128, "shrink_stages": 3}
    yield "lora", {"shrink_stages": 8}
    yield "lora", {"shrink_stages": 6}
    yield "lora", {"split_elements": 1024}
    yield "lora", {"shrink_stages": 4}
    yield "lora", {"expand_registers": None}
    yield "lora", {"expand_registers": 96}
    yield "lora", {"expand_width": 1024}
    yield "lora", {"expand_width": 256}
    yield "lora", {"expand_stages": 4}
    for programs in (16, 64):
        yield "lora", {"programs_per_sm": programs}
    yield "wide_lora", {"programs_per_sm": 16}
    yield "wide_lora", {"programs_per_sm": 32}
    yield "wide_lora", {"split_elements": 4096}
    yield "wide_lora", {"shrink_warps": 8}
    yield "wide_lora", {"shrink_block_k": 64}
    yield "wide_lora", {"expand_width": 128, "expand_narrow": 128}
    yield "wide_lora", {"expand_width": 512, "expand_narrow": 512}
    yield "wide_lora", {"expand_large_n": 128}
    yield "wide_lora", {"expand_warps": 8, "expand_large_n": 256}
    yield "decode", {"split_tokens": 1024}
    yield "decode", {"split_tokens": 256}
    yield "decode", {"whole_tokens": 512}
    yield "decode", {"whole_tokens": 1024}
    yield "decode", {"num_warps": 2}
    yield "decode", {"num_warps": 2, "block_tokens": 32}
    yield "decode", {"num_stages": 3}
    yield "prefill", {"block_tokens": 128}


def sweep(
    bench: Bench,
    ops: TritonOps,
    weights: AdapterWeights,
    ranks: list[int],
    parts: Sequence[str],
    shard: tuple[int, int],
) -> TritonOps:
    """Times every tiling on top of what has helped so far, and returns the best.

    shard  (i, n): only each n-th tiling from the i-th on, so that n processes can compile them all in parallel first.
    """
    best: dict[str, float] = {}
    chosen_variants = [(part, sizes) for part, sizes in variants() if part in parts]
    for part, sizes in chosen_variants[shard[0] :: shard[1]]:
        tiling = dataclasses.replace(getattr(ops.tuning, part), **sizes)
        chosen = TritonOps(ops.num_sms, dataclasses.replace(ops.tuning, **{part: tiling}), overlap=ops.overlap)
        try:
            if part in ("lora", "wide_lora"):
                found = time_lora(bench, chosen, weights, ranks, wide=part == "wide_lora")
            else:
                found = time_attention(bench, chosen, part)
        except (RuntimeError, triton.runtime.errors.TritonError) as error:  # a tiling that does not fit the device
            bench.record(sweep=part, tiling=str(sizes), failed=type(error).__name__)
            continue
        score = sum(WEIGHTS.get(name, 1.0) * us for name, us in found.items())
        kept = score < best.get(part, float("inf"))
        bench.record(sweep=part, tiling=str(sizes), kept=kept, score=score, **found)
        if kept:
            best[part], ops = score, chosen
    return ops


# What a microsecond counts in the choice of a tiling: most of all the batch of many adapters, least the empty one.
WEIGHTS = {
    "distinct qkvo": 1.0,
    "distinct all": 0.5,
    "four adapters qkvo": 0.1,
    "four adapters all": 0.1,
    "one of rank 64 qkvo": 0.05,
    "one of rank 64 all": 0.1,
    "none qkvo": 0.2,
    "none all": 0.2,
}


def time_lora(bench: Bench, ops: Ops, weights: AdapterWeights, ranks: list[int], *, wide: bool) -> dict[str, float]:
    layers, n, found = weights.modules.shape[1], len(ranks), {}
    for name, work, rows in lora_cases(bench, ranks):
        if (rows > n) == wide:
            for modules, groups in (("qkvo", QKVO), ("all", ALL)):
                step = lora_step(bench, ops, weights, groups, work, lora_inputs(bench, rows, groups))
                found[f"{name} {modules}"] = bench.seconds(step) / layers * 1e6
    return found


def time_attention(bench: Bench, ops: Ops, part: str) -> dict[str, float]:
    if part == "decode":
        run = contexts_in_a_run(256)
        cases = {
            "128x512": ([512] * 128, 1),
            "1x900": ([900], 1),
            "16x900": ([900] * 16, 1),
            "1x2048": ([2048], 1),
            "256 in a run": (run, 1),
        }
    else:
        cases = {"1x2048": ([2048], 2048), "4x2048": ([2048] * 4, 512)}
    steps = {name: attention_step(bench, ops, lens, queries, 8192)[0] for name, (lens, queries) in cases.items()}
    return {name: bench.seconds(step) / 2 * 1e6 for name, step in steps.items()}
