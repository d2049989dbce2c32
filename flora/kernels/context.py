"""What a step's queries attend to: each sequence's pages, its length, and the rows that are its queries."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class DecodeParts:
    """What sequences with one query attend to, cut into parts of one length: the longest first, short ones last."""

    items: Tensor  # int32 [capacity, 4]: sequence, number of the part, row of the query, tokens of the whole context
    count: Tensor  # int32 [1]; items past it are unread


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """S sequences. Only the tensors' values change from step to step, so a captured CUDA graph may read them."""

    block_tables: Tensor  # int32 [S, max_pages]; unread past a sequence's last page
    seq_lens: Tensor  # int32 [S]: tokens of context, the queries' own among them; 0 is padding
    query_starts: Tensor  # int32 [S + 1]: sequence s owns rows query_starts[s] : query_starts[s + 1]
    max_queries: int | None = None  # no sequence has more (None: unknown). 1 spares a GPU the prefill launch.
    prefill_range: Tensor | None = None  # int32 [2]: sequences outside have at most one query (None: unknown)
    parts: DecodeParts | None = None  # worked out by Ops.plan_attention, where the implementation has use for them
