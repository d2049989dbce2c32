"""Paged attention in plain torch: the formula, and on a CPU the path that serves.

A query row's output is the same bits whether its prompt came whole or in chunks, alone or in a batch, in a short block
table or a long one. Three things make it so:
- the context is cut into blocks of KV_BLOCK tokens at absolute positions, and every product is one batched matmul per
  block; the blocks' results are then added one after another, and a block that a row does not see adds exactly zero;
- the softmax's maximum is taken over the whole context first, and a maximum does not depend on the order;
- query rows are padded to a multiple of MIN_ROWS: with fewer, MKL's batched matmul takes other kernels.
The last is a measured property, so it is probed once per head size; where it fails, each token is its own tile of one
fixed shape, slower and right.
"""

from functools import cache

import torch
from torch import Tensor

from flora.kernels.context import Context

KV_BLOCK = 64  # tokens
MIN_ROWS = 8
QUERY_TILE = 64  # tokens of one sequence that are attended together


def paged_attention(q: Tensor, kv: Tensor, context: Context, softmax_scale: float) -> Tensor:
    """See Ops.paged_attention."""
    block_tables, seq_lens, query_starts = context.block_tables, context.seq_lens, context.query_starts
    out = torch.zeros_like(q)
    starts, lengths = query_starts.tolist(), seq_lens.tolist()
    tile = QUERY_TILE if bmm_keeps_rows(q.shape[2]) or q.device.type != "cpu" else 1
    singles: dict[int, list[int]] = {}  # sequences with one query, by context blocks rounded up to a power of two
    for s, length in enumerate(lengths):
        num_queries = starts[s + 1] - starts[s]
        if length == 0 or num_queries == 0:
            continue
        if num_queries == 1:
            singles.setdefault(1 << (_blocks(length) - 1).bit_length(), []).append(s)
            continue
        keys, values = _gather(kv, block_tables[s : s + 1], [length], _blocks(length))
        for first in range(0, num_queries, tile):
            last = min(first + tile, num_queries)
            span = slice(starts[s] + first, starts[s] + last)
            positions = torch.arange(length - num_queries + first, length - num_queries + last, device=q.device)
            out[span] = _attend(q[span][None], keys, values, positions[None], softmax_scale)[0]
    for num_blocks, sequences in singles.items():
        picked = torch.tensor(sequences, device=q.device)
        rows = query_starts[picked].long()
        keys, values = _gather(kv, block_tables[picked], [lengths[s] for s in sequences], num_blocks)
        out[rows] = _attend(q[rows][:, None], keys, values, (seq_lens[picked] - 1)[:, None], softmax_scale)[:, 0]
    return out


def _blocks(tokens: int) -> int:
    return -(-tokens // KV_BLOCK)


def _gather(kv: Tensor, block_tables: Tensor, lengths: list[int], num_blocks: int) -> tuple[Tensor, Tensor]:
    """Keys and values of some sequences, float32 [sequences, num_blocks, KV_BLOCK, num_kv_heads, head_dim].

    Values past a length are zero, since a weight of zero times a stale NaN would still be NaN. Keys past it are left:
    each touches only its own score, which is masked.
    """
    page_tokens = kv.shape[2]
    num_pages = -(-num_blocks * KV_BLOCK // page_tokens)
    used = torch.tensor([[-(-length // page_tokens)] for length in lengths], device=kv.device)
    tables = block_tables[:, :num_pages]
    tables = torch.nn.functional.pad(tables, (0, num_pages - tables.shape[1]))
    pages = torch.where(torch.arange(num_pages, device=kv.device) < used, tables, 0).flatten()
    shape = (len(lengths), num_pages * page_tokens, *kv.shape[3:])
    blocked = (len(lengths), num_blocks, KV_BLOCK, *kv.shape[3:])
    gathered = [kv[:, i].index_select(0, pages).float().view(shape)[:, : num_blocks * KV_BLOCK] for i in (0, 1)]
    for values, length in zip(gathered[1], lengths, strict=True):
        values[length:] = 0
    return gathered[0].reshape(blocked), gathered[1].reshape(blocked)


def _attend(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, softmax_scale: float) -> Tensor:
    """softmax(q . keys) . values over the tokens at or before each query's position.

    q             [sequences, queries, num_q_heads, head_dim]
    keys, values  float32 [sequences, num_blocks, KV_BLOCK, num_kv_heads, head_dim]
    positions     [sequences, queries]
    returns       [sequences, queries, num_q_heads, head_dim] in q's dtype
    """
    sequences, queries, num_q_heads, head_dim = q.shape
    num_blocks, num_kv_heads = keys.shape[1], keys.shape[3]
    group = num_q_heads // num_kv_heads
    rows = -(-queries * group // MIN_ROWS) * MIN_ROWS

    visible = int(positions.max()) // KV_BLOCK + 1 if sequences == 1 else num_blocks
    keys, values = keys[:, :visible], values[:, :visible]
    tokens = torch.arange(visible * KV_BLOCK, device=q.device).view(visible, 1, KV_BLOCK)
    row_positions = positions.repeat_interleave(group, dim=1)  # row = query * group + head of the group
    row_positions = torch.nn.functional.pad(row_positions, (0, rows - queries * group))
    hidden = tokens > row_positions[:, None, :, None]  # [sequences, blocks, rows, KV_BLOCK]

    q32 = (q.float() * softmax_scale).view(sequences, queries, num_kv_heads, group, head_dim)
    out = torch.empty_like(q32)
    for head in range(num_kv_heads):
        q_head = q32[:, :, head].reshape(sequences, queries * group, head_dim)
        q_head = torch.nn.functional.pad(q_head, (0, 0, 0, rows - queries * group))
        q_head = q_head[:, None].expand(-1, visible, -1, -1).reshape(sequences * visible, rows, head_dim)
        scores = torch.bmm(q_head, keys[:, :, :, head].flatten(0, 1).transpose(1, 2))
        scores = scores.view(hidden.shape).masked_fill_(hidden, float("-inf"))
        weights = scores.sub_(scores.amax((1, 3), keepdim=True)).exp_()
        partial = torch.bmm(weights.flatten(0, 1), values[:, :, :, head].flatten(0, 1)).view(
            sequences, visible, rows, head_dim
        )
        result = _in_order(partial) / _in_order(weights.sum(-1, keepdim=True))
        out[:, :, head] = result[:, : queries * group].view(sequences, queries, group, head_dim)
    return out.view(q.shape).to(q.dtype)


def _in_order(blocks: Tensor) -> Tensor:
    """The sum over dim 1, first to last: torch's own sum would pair its terms by their number."""
    total = torch.zeros_like(blocks[:, 0])
    for block in blocks.unbind(1):
        total += block
    return total


@cache
def bmm_keeps_rows(head_dim: int) -> bool:
    """Whether this machine's batched matmul gives one row equal bits at every row count, place and batch used here."""
    generator = torch.Generator().manual_seed(0)
    for inner, columns, transposed in ((head_dim, KV_BLOCK, True), (KV_BLOCK, head_dim, False)):
        row = torch.randn(inner, generator=generator)
        matrix = torch.randn((columns, inner) if transposed else (inner, columns), generator=generator)
        seen: Tensor | None = None
        for batch, num_rows in ((1, 8), (2, 16), (5, 24), (1, 64), (3, 192), (1, 576)):
            left = torch.randn(batch, num_rows, inner, generator=generator)
            right = torch.randn(batch, *matrix.shape, generator=generator)
            places = [0, num_rows // 2, num_rows - 1]
            left[batch // 2, places] = row
            right[batch // 2] = matrix
            product = torch.bmm(left, right.transpose(1, 2) if transposed else right)
            for bits in product[batch // 2, places].view(torch.int32):
                seen = bits if seen is None else seen
                if not torch.equal(bits, seen):
                    return False
    return True
