"""Decode attention on a CPU: all heads of a sequence in one product, and what is the same in every layer computed once.

The reference multiplies head by head and plans anew in each layer, which for one query a sequence is mostly calls. Here
a query head is widened to the keys of all heads, with zeros outside its own, so that one product of 64 tokens serves
them all. Terms of zero change no sum, so the bits are the reference's wherever the machine's product sums in order;
`keeps_the_references_bits` asks the machine, and where it does not, the reference runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from flora.kernels import Context, ReferenceOps

BLOCK = 64  # tokens, the reference's own: sums are cut at the same places
ROWS = 8  # query rows of a product come in multiples of it
FEW_BLOCKS = 16  # computed for nothing in less time than another round of calls takes

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class DecodePlan:
    """S sequences with one query each, and B blocks of context: as many as the longest of them needs, or more."""

    rows: Tensor  # int64 [S]: of q
    pages: Tensor  # int64 [S * pages of B blocks]; the null page past a sequence's last
    hidden: Tensor  # bool [S, B, 1, BLOCK]: tokens past the sequence's length
    past: Tensor  # int64: the same tokens, counted through [S * B * BLOCK]


def plan_decode(context: Context, page_tokens: int) -> list[DecodePlan]:
    """The sequences with exactly one query: all together, or those of like length where that would waste much."""
    starts, lengths = context.query_starts.tolist(), context.seq_lens.tolist()
    blocks = {s: -(-length // BLOCK) for s, length in enumerate(lengths) if length and starts[s + 1] - starts[s] == 1}
    longest = max(blocks.values(), default=0)
    together = len(blocks) * longest <= 2 * sum(blocks.values()) + FEW_BLOCKS
    by_blocks: dict[int, list[int]] = {}
    for s, needed in blocks.items():
        by_blocks.setdefault(longest if together else 1 << (needed - 1).bit_length(), []).append(s)
    plans = []
    for num_blocks, sequences in by_blocks.items():
        picked = torch.tensor(sequences)
        num_pages = -(-num_blocks * BLOCK // page_tokens)
        tables = context.block_tables[picked, :num_pages]
        tables = F.pad(tables, (0, num_pages - tables.shape[1]))
        picked_lens = context.seq_lens[picked, None]
        unused = torch.arange(num_pages) * page_tokens >= picked_lens
        hidden = torch.arange(num_blocks * BLOCK) >= picked_lens
        plans.append(
            DecodePlan(
                rows=context.query_starts[picked].long(),
                pages=tables.masked_fill(unused, 0).long().flatten(),
                hidden=hidden.view(len(sequences), num_blocks, 1, BLOCK),
                past=hidden.flatten().nonzero().flatten(),
            )
        )
    return plans


def attend(q: Tensor, kv: Tensor, plan: DecodePlan, softmax_scale: float) -> Tensor:
    """softmax(q . keys) . values of the plan's sequences, float32 [S, num_q_heads, head_dim].

    q   [n, num_q_heads, head_dim];  kv  [num_pages, 2, page_tokens, num_kv_heads, head_dim]
    """
    num_q_heads, head_dim = q.shape[1:]
    num_kv_heads = kv.shape[3]
    sequences, blocks = plan.hidden.shape[:2]
    width = num_kv_heads * head_dim
    keys, values = (
        kv[:, i].index_select(0, plan.pages).float().view(sequences, -1, width)[:, : blocks * BLOCK] for i in (0, 1)
    )
    keys = keys.reshape(sequences * blocks, BLOCK, width)
    values = values.reshape(sequences * blocks * BLOCK, width)
    values.index_fill_(0, plan.past, 0)  # a weight of zero times a stale NaN would still be NaN
    values = values.view(sequences * blocks, BLOCK, width)

    heads, own, own_only = _own_heads(num_q_heads, num_kv_heads)
    wide = (q[plan.rows].float()[:, :, None] * (own_only * softmax_scale)).view(sequences, num_q_heads, width)
    wide = F.pad(wide, (0, 0, 0, -num_q_heads % ROWS))
    rows = wide.shape[1]
    wide = wide[:, None].expand(-1, blocks, -1, -1).reshape(sequences * blocks, rows, width)

    scores = torch.bmm(wide, keys.transpose(1, 2)).view(sequences, blocks, rows, BLOCK)
    scores.masked_fill_(plan.hidden, float("-inf"))
    weights = scores.sub_(scores.amax((1, 3), keepdim=True)).exp_()
    partial = torch.bmm(weights.flatten(0, 1), values).view(sequences, blocks, rows, num_kv_heads, head_dim)
    return _in_order(partial)[:, heads, own] / _in_order(weights.sum(-1, keepdim=True))[:, :num_q_heads]


@cache
def _own_heads(num_q_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every query head, int64 [num_q_heads]; its key head; and 1 at that key head, 0 elsewhere, [q, kv, 1]."""
    heads = torch.arange(num_q_heads)
    own = heads // (num_q_heads // num_kv_heads)
    return heads, own, F.one_hot(own, num_kv_heads).float()[:, :, None]


def _in_order(blocks: Tensor) -> Tensor:
    """The sum over dim 1, first to last, as the reference adds its blocks."""
    total = blocks[:, 0] + 0.0  # the reference starts from zero, which turns a first -0.0 into 0.0
    for block in blocks.unbind(1)[1:]:
        total += block
    return total


@cache
def keeps_the_references_bits(num_q_heads: int, num_kv_heads: int, head_dim: int, num_threads: int) -> bool:
    """Whether this machine's wide products give the reference's bits, for contexts of one block to many.

    num_threads  torch's now: another number may take another way
    """
    generator = torch.Generator().manual_seed(0)
    page_tokens, lengths = 16, (1, 2, 63, 64, 65, 130, 700, 701)
    num_pages = -(-max(lengths) // page_tokens)
    kv = torch.randn(num_pages + 1, 2, page_tokens, num_kv_heads, head_dim, generator=generator)
    for together in (*((length,) for length in lengths), lengths[:3], lengths):
        count = len(together)
        seq_lens = torch.tensor(together, dtype=torch.int32)
        starts = torch.arange(count + 1, dtype=torch.int32)
        tables = (torch.rand(count, num_pages, generator=generator).argsort(1) + 1).int()
        q = torch.randn(count, num_q_heads, head_dim, generator=generator)
        context = Context(tables, seq_lens, starts)
        expected = ReferenceOps().paged_attention(q, kv, context, head_dim**-0.5)
        for plan in plan_decode(context, page_tokens):
            if not torch.equal(attend(q, kv, plan, head_dim**-0.5), expected[plan.rows]):
                return False
    return True
