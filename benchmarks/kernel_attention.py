"""Paged attention: its errors, its rate, and torch's own beside it over keys and values that lie contiguous."""

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from kernel_world import SEED, Bench, Step, relative
from torch import Tensor

from flora.kernels import Context, Ops, ReferenceOps

PAGE_TOKENS = 16


def caches(bench: Bench, lens: Sequence[int], table_tokens: int) -> tuple[list[Tensor], Tensor]:
    """Two planes of random keys and values on shuffled pages, and block tables for contexts of up to table_tokens."""
    counts = [-(-length // PAGE_TOKENS) for length in lens]
    shape = (sum(counts), 2, PAGE_TOKENS, bench.model.kv_heads, bench.model.head_dim)
    planes = [torch.randn(shape, device=bench.device, dtype=bench.dtype) for _ in range(2)]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(SEED)).int()
    tables = torch.zeros(len(lens), -(-table_tokens // PAGE_TOKENS), dtype=torch.int32)
    for row, pages in zip(tables, order.split(counts), strict=True):
        row[: len(pages)] = pages
    return planes, tables.to(bench.device)


def attention_step(
    bench: Bench, ops: Ops, lens: Sequence[int], queries: int, table_tokens: int = 0
) -> tuple[Step, float | None]:
    """Attention of sequences of these contexts over two planes in turn; and, for a small batch, its error against
    float32. What is worked out once a step is there before.

    table_tokens  that a context could have; 0: as many as the longest has
    """
    planes, tables = caches(bench, lens, table_tokens or max(lens))
    model = bench.model
    q = torch.randn(len(lens) * queries, model.q_heads, model.head_dim, device=bench.device, dtype=bench.dtype)
    starts = (torch.arange(len(lens) + 1) * queries).int().to(bench.device)
    scale = model.head_dim**-0.5
    seq_lens = torch.tensor(lens, dtype=torch.int32, device=bench.device)
    context = Context(tables, seq_lens, starts, max_queries=1 if queries == 1 else None)
    planned = ops.plan_attention(context, PAGE_TOKENS)

    def step() -> None:
        for plane in planes:
            ops.paged_attention(q, plane, planned, scale)

    if len(lens) > 4:
        return step, None
    wanted = ReferenceOps().paged_attention(q.float(), planes[0], context, scale)
    return step, relative(ops.paged_attention(q, planes[0], planned, scale).float(), wanted)


def check_attention(bench: Bench, ops: Ops) -> None:
    for kind, context, queries in (("decode", 496, 1), ("decode", 2000, 1), ("prefill", 704, 300)):
        _, error = attention_step(bench, ops, [context] * 4, queries)
        assert error is not None
        bench.check(check="attention", kind=kind, context=context, queries=queries, error=error)


def bench_attention(bench: Bench, ops: Ops) -> None:
    model = bench.model
    for batch in (128, 256):
        for context in (512, 2048):
            bench_decode(bench, ops, [context] * batch, batch=batch, context=context)
    lens = contexts_in_a_run(256)
    bench_decode(bench, ops, lens, 8192, batch=256, context=f"{min(lens)} to {max(lens)}", table_tokens=8192)
    for batch, context, queries in ((1, 2048, 2048), (4, 2048, 512)):
        step, _ = attention_step(bench, ops, [context] * batch, queries)
        seconds = bench.seconds(step) / 2
        pairs = batch * queries * (context - (queries - 1) / 2)
        flops = 4 * pairs * model.q_heads * model.head_dim
        bench.record(
            op="prefill attention",
            batch=batch,
            context=context,
            queries=queries,
            us=seconds * 1e6,
            tflop_s=flops / seconds / 1e12,
        )
    contiguous_baseline(bench, 128, 512)


def contexts_in_a_run(count: int) -> list[int]:
    """Of sequences somewhere in their answers, prompts and answers of 8 to 511 tokens."""
    draw = random.Random(SEED)
    return [draw.randrange(8, 512) + int(draw.random() * draw.randrange(8, 512)) for _ in range(count)]


def bench_decode(bench: Bench, ops: Ops, lens: Sequence[int], tokens: int = 0, **facts: object) -> None:
    step, _ = attention_step(bench, ops, lens, 1, tokens)
    seconds = bench.seconds(step) / 2
    read = sum(lens) * bench.model.kv_heads * bench.model.head_dim * 2 * 2
    bench.record(op="decode attention", **facts, us=seconds * 1e6, tb_s=read / seconds / 1e12)


def contiguous_baseline(bench: Bench, batch: int, context: int) -> None:
    """torch's attention over keys and values that lie contiguous, which a paged server's do not."""
    model = bench.model
    q = torch.randn(batch, model.q_heads, 1, model.head_dim, device=bench.device, dtype=bench.dtype)
    kv = [
        torch.randn(2, batch, model.kv_heads, context, model.head_dim, device=bench.device).to(bench.dtype)
        for _ in range(2)
    ]

    def step() -> None:
        for k, v in kv:
            F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    seconds = bench.seconds(step) / 2
    read = kv[0].numel() * 2
    bench.record(
        op="torch sdpa, contiguous", batch=batch, context=context, us=seconds * 1e6, tb_s=read / seconds / 1e12
    )
