"""Shrink and expand: their errors, their rate by true ranks, and other engines' kernels and torch.bmm beside them."""

from collections.abc import Callable, Iterator

import torch
from kernel_world import ALL, QKVO, RANKS, Bench, Model, Step, cut_work, decode_work, prompt_work, relative
from peer_kernels import NoPeer, PeerLora, expected, slotted_module
from torch import Tensor

from flora.kernels import AdapterWeights, Group, LoraWork, Ops, ReferenceOps
from flora.kernels.triton_ops import TritonOps

Inputs = dict[Group, tuple[Tensor, Tensor]]  # x and y


def lora_inputs(bench: Bench, n: int, groups: tuple[Group, ...]) -> Inputs:
    def randn(columns: int) -> Tensor:
        return torch.randn(n, columns, device=bench.device).to(bench.dtype)

    return {g: (randn(bench.model.inputs[g.value[0]]), randn(sum(bench.model.outs(g)[1]))) for g in groups}


def shrink_step(bench: Bench, ops: Ops, weights: AdapterWeights, group: Group, work: LoraWork, x: Tensor) -> Step:
    def step() -> None:
        for layer in range(weights.modules.shape[1]):
            ops.lora_shrink(x, weights, bench.model.place(layer, group), work.shrink)

    return step


def expand_step(
    bench: Bench, ops: Ops, weights: AdapterWeights, group: Group, work: LoraWork, x: Tensor, y: Tensor
) -> Step:
    places = [bench.model.place(layer, group) for layer in range(weights.modules.shape[1])]
    shrunk = [ops.lora_shrink(x, weights, place, work.shrink) for place in places]

    def step() -> None:
        for place, v in zip(places, shrunk, strict=True):
            ops.lora_expand(y, v, weights, place, work.expand)

    return step


def lora_step(
    bench: Bench, ops: Ops, weights: AdapterWeights, groups: tuple[Group, ...], work: LoraWork, data: Inputs
) -> Step:
    def step() -> None:
        for layer in range(weights.modules.shape[1]):
            for group in groups:
                x, y = data[group]
                place = bench.model.place(layer, group)
                ops.lora_expand(y, ops.lora_shrink(x, weights, place, work.shrink), weights, place, work.expand)

    return step


def check_lora(
    bench: Bench, ops: Ops, weights: AdapterWeights, ranks: list[int], rows_each: int = 1, name: str = "lora"
) -> None:
    """Relative error of one layer's update against float32, and the same for torch's own rounding of it to bf16."""
    slots = list(range(0, len(ranks), max(1, len(ranks) // 16)))
    work = decode_work(bench, slots, rows_each, ranks)
    for group, (x, y) in lora_inputs(bench, len(slots) * rows_each, ALL).items():
        result, wanted = y.clone(), y.float()
        place = bench.model.place(0, group)
        ops.lora_expand(result, ops.lora_shrink(x, weights, place, work.shrink), weights, place, work.expand)
        v = ReferenceOps().lora_shrink(x.float(), weights, place, work.shrink)
        ReferenceOps().lora_expand(wanted, v, weights, place, work.expand)
        bench.check(
            check=name,
            group=group.name,
            rows_each=rows_each,
            error=relative(result.float(), wanted),
            rounding=relative(wanted.to(bench.dtype).float(), wanted),
        )


def lora_bytes(model: Model, ranks: list[int], groups: tuple[Group, ...], layers: int) -> tuple[int, int]:
    """Bytes of A and of B that one pass over all adapters must read."""
    modules = [m for g in groups for m in g.value]
    total = sum(ranks) * layers * 2
    return total * sum(model.inputs[m] for m in modules), total * sum(model.outputs[m] for m in modules)


def bench_lora(bench: Bench, ops: TritonOps, weights: AdapterWeights, ranks: list[int]) -> None:
    layers, n = weights.modules.shape[1], len(ranks)
    work = decode_work(bench, list(range(n)), 1, ranks)
    data = lora_inputs(bench, n, ALL)
    for name, groups in (("q,k,v,o", QKVO), ("all seven", ALL)):
        read = sum(lora_bytes(bench.model, ranks, groups, layers))
        for overlap in {ops.overlap, False}:
            chosen = TritonOps(ops.num_sms, ops.tuning, overlap=overlap)
            seconds = bench.seconds(lora_step(bench, chosen, weights, groups, work, data))
            us, rate = seconds / layers * 1e6, read / seconds / 1e12
            bench.record(op="lora", modules=name, adapters=n, overlap=overlap, us_per_layer=us, tb_s=rate)
    for group in ALL:
        x, y = data[group]
        steps = (
            ("shrink", shrink_step(bench, ops, weights, group, work, x)),
            ("expand", expand_step(bench, ops, weights, group, work, x, y)),
        )
        for (name, step), read in zip(steps, lora_bytes(bench.model, ranks, (group,), layers), strict=True):
            seconds = bench.seconds(step)
            bench.record(op=name, group=group.name, adapters=n, us=seconds / layers * 1e6, tb_s=read / seconds / 1e12)
    padded_baseline(bench, n, max(ranks))


def bench_peer(bench: Bench, name: str, make: Callable[[list[int]], PeerLora], ranks: list[int], layers: int) -> None:
    """Another engine's kernels, distinct adapters as in bench_lora; a row says why where there are none.

    name  of the engine's rows;  make  its kernels, for rows that want these slots
    """
    n, model, slots = len(ranks), bench.model, list(range(len(ranks)))
    try:
        peer = make(slots)
    except NoPeer as error:
        bench.record(op=name, skipped=str(error)[:200])
        return
    data = lora_inputs(bench, n, ALL)
    for modules, groups in (("q,k,v,o", QKVO), ("all seven", ALL)):
        layers_of_packed = []
        for layer in range(layers):
            packed_of = {}
            for group in groups:
                x, y = data[group]
                module = slotted_module(ranks, x.shape[1], model.outs(group)[1], bench.dtype, bench.device)
                packed_of[group] = peer.packed(module, n)
                if layer == 0:
                    result = y.clone()
                    peer.add(result, x, packed_of[group])
                    error = relative(result.float(), expected(y, x, module, slots))
                    bench.check(check=name, group=group.name, error=error)
            layers_of_packed.append(packed_of)

        def step(layers_of_packed: list = layers_of_packed) -> None:
            for packed_of in layers_of_packed:
                for group, packed in packed_of.items():
                    x, y = data[group]
                    peer.add(y, x, packed)

        seconds, read = bench.seconds(step), sum(lora_bytes(model, ranks, groups, layers))
        bench.record(
            op=name, modules=modules, adapters=n, version=peer.version, us_per_layer=seconds / layers * 1e6,
            tb_s=read / seconds / 1e12,
        )  # fmt: skip


def padded_baseline(bench: Bench, n: int, rank: int) -> None:
    """q, k, v, o with every adapter padded to the highest rank in its own slot: torch.bmm, at its best layout."""
    model = bench.model
    modules = [m for g in QKVO for m in g.value]
    factors = [
        (
            torch.randn(n, model.inputs[m], rank, device=bench.device).to(bench.dtype),
            torch.randn(n, rank, model.outputs[m], device=bench.device).to(bench.dtype),
        )
        for m in modules
    ]
    x = torch.randn(n, 1, model.hidden, device=bench.device).to(bench.dtype)
    ys = [torch.zeros(n, 1, model.outputs[m], device=bench.device).to(bench.dtype) for m in modules]

    def step() -> None:
        for y, (a, b) in zip(ys, factors, strict=True):
            y.baddbmm_(torch.bmm(x, a), b)

    seconds = bench.seconds(step)
    read = sum(a.numel() + b.numel() for a, b in factors) * 2
    bench.record(
        op="padded torch.bmm", modules="q,k,v,o", adapters=n, us_per_layer=seconds * 1e6, tb_s=read / seconds / 1e12
    )


def lora_cases(bench: Bench, ranks: list[int]) -> Iterator[tuple[str, LoraWork, int]]:
    """(name, work list, rows): decode over all adapters, over few, over none; and prefill of one adapter."""
    n, hot = len(ranks), [ranks.index(rank) for rank in RANKS]
    yield "distinct", decode_work(bench, list(range(n)), 1, ranks), n
    yield "four adapters", decode_work(bench, hot, n // 4, ranks), n
    yield "one of rank 64", decode_work(bench, hot[-1:], n, ranks), n
    yield "none", cut_work(bench, [], ranks, n), n
    yield "prefill 2048, rank 64", prompt_work(bench, hot[-1], 2048, ranks), 2048
    yield "prefill 2048, rank 16", prompt_work(bench, hot[1], 2048, ranks), 2048


def bench_cases(bench: Bench, ops: Ops, weights: AdapterWeights, ranks: list[int]) -> None:
    for name, work, rows in lora_cases(bench, ranks):
        seconds = bench.seconds(lora_step(bench, ops, weights, ALL, work, lora_inputs(bench, rows, ALL)))
        us = seconds / weights.modules.shape[1] * 1e6
        bench.record(op="lora", case=name, modules="all seven", rows=rows, us_per_layer=us)
