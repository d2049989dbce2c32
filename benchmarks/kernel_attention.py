"""Paged attention: its errors, its rate, and torch's own beside it over keys and values that lie contiguous."""

import torch
import torch.nn.functional as F
from kernel_world import SEED, Bench, Step, relative
from torch import Tensor

from flora.kernels import Context, Ops, ReferenceOps


def caches(bench: Bench, batch: int, context: int, page_tokens: int = 16) -> tuple[list[Tensor], Tensor]:
    """Two planes of random keys and values on shuffled pages, and the block tables."""
    pages = batch * context // page_tokens
    shape = (pages, 2, page_tokens, bench.model.kv_heads, bench.model.head_dim)
    planes = [torch.randn(shape, device=bench.device, dtype=bench.dtype) for _ in range(2)]
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(SEED)).int().view(batch, -1)
    return planes, order.to(bench.device)


def attention_step(bench: Bench, ops: Ops, batch: int, context: int, queries: int) -> tuple[Step, float | None]:
    """Attention of `batch` sequences over two planes in turn; and, for a small batch, its error against float32."""
    planes, tables = caches(bench, batch, context)
    model = bench.model
    q = torch.randn(batch * queries, model.q_heads, model.head_dim, device=bench.device, dtype=bench.dtype)
    lens = torch.full((batch,), context, dtype=torch.int32, device=bench.device)
    starts = (torch.arange(batch + 1) * queries).int().to(bench.device)
    scale = model.head_dim**-0.5
    most = 1 if queries == 1 else None

    def attend(ops: Ops, q: Tensor, plane: Tensor) -> Tensor:
        return ops.paged_attention(q, plane, Context(tables, lens, starts, max_queries=most), scale)

    def step() -> None:
        for plane in planes:
            attend(ops, q, plane)

    if batch > 4:
        return step, None
    return step, relative(attend(ops, q, planes[0]).float(), attend(ReferenceOps(), q.float(), planes[0]))


def check_attention(bench: Bench, ops: Ops) -> None:
    for kind, context, queries in (("decode", 496, 1), ("decode", 2000, 1), ("prefill", 704, 300)):
        _, error = attention_step(bench, ops, 4, context, queries)
        assert error is not None
        bench.check(check="attention", kind=kind, context=context, queries=queries, error=error)


def bench_attention(bench: Bench, ops: Ops) -> None:
    model = bench.model
    for batch in (128, 256):
        for context in (512, 2048):
            step, _ = attention_step(bench, ops, batch, context, 1)
            seconds = bench.seconds(step) / 2
            read = batch * context * model.kv_heads * model.head_dim * 2 * 2
            bench.record(
                op="decode attention", batch=batch, context=context, us=seconds * 1e6, tb_s=read / seconds / 1e12
            )
    for batch, context, queries in ((1, 2048, 2048), (4, 2048, 512)):
        step, _ = attention_step(bench, ops, batch, context, queries)
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
