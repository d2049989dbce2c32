"""The reference's operations with fewer calls in each layer of a step: what plans them is computed once."""

from collections.abc import Callable
from dataclasses import replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from flora.kernels import AdapterWeights, Context, LowRankTerms, Place, ReferenceOps, WorkList, rope
from flora.serve.engine.cpu.attention import DecodePlan, attend, keeps_the_references_bits, plan_decode
from flora.serve.engine.cpu.lora import Tiles, expand, plan_tiles, shrink

Value = TypeVar("Value")


class StepValue(Generic[Value]):
    """What follows from one of the step's tensors: computed in the first layer, kept while the others bring the same.

    A step's tensors are made anew for each step and not written to after that: the same object has the same values.
    """

    def __init__(self) -> None:
        self._source: Tensor | None = None
        self._value: Value

    def get(self, source: Tensor, compute: Callable[[], Value]) -> Value:
        if source is not self._source:
            self._source, self._value = source, compute()
        return self._value


class CpuOps(ReferenceOps):
    """ReferenceOps for one model's steps, one after the other: row-invariant like it, and faster."""

    name = "cpu"

    def __init__(self) -> None:
        self._tiles: StepValue[list[Tiles]] = StepValue()
        self._plans: StepValue[tuple[list[DecodePlan], Tensor | None]] = StepValue()
        self._turns: StepValue[tuple[Tensor, Tensor]] = StepValue()
        self._places: StepValue[tuple[Tensor, Tensor]] = StepValue()

    def lora_shrink(self, x: Tensor, weights: AdapterWeights, place: Place, work: WorkList) -> Tensor:
        """See Ops.lora_shrink; here splits is 1."""
        v = torch.empty(1, len(x), work.max_rank * len(place.group.value))
        for tiles in self._tiles.get(work.segments, lambda: plan_tiles(work, weights)):
            shrink(x, v[0], tiles, weights, place)
        return v

    def lora_expand(
        self, y: Tensor, v: Tensor, weights: AdapterWeights, place: Place, work: WorkList, *, add: bool = True
    ) -> None:
        """See Ops.lora_expand."""
        assert add, "nothing runs beside anything on a CPU"
        for tiles in self._tiles.get(work.segments, lambda: plan_tiles(work, weights)):
            expand(y, v[0], tiles, weights, place)

    def paged_attention(self, q: Tensor, kv: Tensor, context: Context, softmax_scale: float) -> Tensor:
        """See Ops.paged_attention."""
        if not keeps_the_references_bits(q.shape[1], kv.shape[3], q.shape[2], torch.get_num_threads()):
            return super().paged_attention(q, kv, context, softmax_scale)

        def plan() -> tuple[list[DecodePlan], Tensor | None]:
            """The decoding sequences, and the lengths of the others, if there are any."""
            decoding = context.query_starts.diff() == 1
            others = None if bool(decoding.all()) else context.seq_lens.masked_fill(decoding, 0)
            return plan_decode(context, kv.shape[2]), others

        plans, others = self._plans.get(context.block_tables, plan)
        if others is None:
            out = torch.zeros_like(q)
        else:
            out = super().paged_attention(q, kv, replace(context, seq_lens=others), softmax_scale)
        for group in plans:
            out[group.rows] = attend(q, kv, group, softmax_scale).to(q.dtype)
        return out

    def rope_store(
        self,
        qkv: Tensor,
        positions: Tensor,
        cos: Tensor,
        sin: Tensor,
        kv: Tensor,
        slots: Tensor,
        terms: LowRankTerms | None = None,
    ) -> Tensor:
        """See Ops.rope_store."""
        assert terms is None, "nothing runs beside anything on a CPU"
        num_kv_heads, head_dim = kv.shape[3:]
        heads = qkv.view(len(qkv), -1, head_dim)
        num_turned = heads.shape[1] - num_kv_heads
        turned = rope(heads[:, :num_turned], *self._turns.get(positions, lambda: (cos[positions], sin[positions])))
        kept, places = self._places.get(slots, lambda: _places(slots, kv.shape[2]))
        stored = torch.stack((turned[:, num_turned - num_kv_heads :], heads[:, num_turned:]), dim=1)
        kv[places[0], :, places[1]] = stored[kept].to(kv.dtype)
        return turned[:, : num_turned - num_kv_heads]


def _places(slots: Tensor, page_tokens: int) -> tuple[Tensor, Tensor]:
    """The rows that are stored, int64 [k], and their pages and offsets, int64 [2, k]."""
    kept = (slots >= 0).nonzero().flatten()
    stored = slots[kept]
    return kept, torch.stack((torch.div(stored, page_tokens, rounding_mode="floor"), stored % page_tokens))
