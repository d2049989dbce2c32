"""Every operation in plain torch: the ground truth of the Triton kernels, and the path that serves on a CPU.

On a CPU a row's result is the same bits whatever the batch around it: products go through `linear`, which is
row-invariant there, and the rest rounds each element by itself.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flora.kernels import pointwise, reference_attention
from flora.kernels.context import Context
from flora.kernels.linear import linear
from flora.kernels.modules import CHUNK, Place, padded
from flora.kernels.terms import LowRankTerms
from flora.kernels.weights import AdapterWeights
from flora.kernels.work import WorkList


class ReferenceOps:
    """Ops in plain torch, for any device."""

    name = "reference"

    def lora_shrink(self, x: Tensor, weights: AdapterWeights, place: Place, work: WorkList) -> Tensor:
        """See Ops.lora_shrink; here float32 [n, width], the slices back to back by each row's own ranks."""
        width = work.max_rank * len(place.group.value)
        v = torch.empty(x.shape[0], width, dtype=torch.float32, device=x.device)
        for slot, first, count in _segments(work):
            records = _records(weights, slot, place)
            factors = _matrices(weights, slot, [(rank, a_chunk, x.shape[1]) for rank, a_chunk, _ in records])
            if factors:
                a = torch.cat(factors) if len(factors) > 1 else factors[0]  # [total rank, in_features]
                v[first : first + count, : a.shape[0]] = linear(x[first : first + count].float(), a)
        return v

    def lora_expand(
        self, y: Tensor, v: Tensor, weights: AdapterWeights, place: Place, work: WorkList, *, add: bool = True
    ) -> None:
        """See Ops.lora_expand."""
        for slot, first, count in _segments(work):
            if not add:
                y[first : first + count] = 0
            records = _records(weights, slot, place)
            scales = weights.scales[slot, place.layer].tolist()
            column = 0
            slices = zip(records, place.group.value, place.out_starts, place.out_sizes, strict=True)
            present = [(rank, chunk, module, start, size) for (rank, _, chunk), module, start, size in slices if rank]
            factors = _matrices(weights, slot, [(rank, chunk, size) for rank, chunk, _, _, size in present])
            for (rank, _, module, start, size), b in zip(present, factors, strict=True):  # b is [rank, out]
                # The scale goes on first: y + scale * delta in one torch call may fuse, and its tail does not.
                delta = linear(v[first : first + count, column : column + rank] * scales[module], b.t())
                target = y[first : first + count, start : start + size]
                if y.dtype == torch.float32:
                    target += delta
                else:
                    target.copy_(target.float() + delta)
                column += rank

    def store_kv(self, k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> None:
        """See Ops.store_kv."""
        kept = slots >= 0
        page = torch.div(slots[kept], kv.shape[2], rounding_mode="floor")
        offset = slots[kept] % kv.shape[2]
        kv[page, 0, offset] = k[kept].to(kv.dtype)
        kv[page, 1, offset] = v[kept].to(kv.dtype)

    def plan_attention(self, context: Context, page_tokens: int) -> Context:
        """See Ops.plan_attention."""
        return context

    def paged_attention(self, q: Tensor, kv: Tensor, context: Context, softmax_scale: float) -> Tensor:
        """See Ops.paged_attention."""
        return reference_attention.paged_attention(q, kv, context, softmax_scale)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See Ops.rms_norm."""
        return pointwise.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: Tensor, delta: Tensor, weight: Tensor, eps: float, terms: LowRankTerms | None = None
    ) -> Tensor:
        """See Ops.add_rms_norm."""
        x += terms.added_to(delta) if terms else delta
        return pointwise.rms_norm(x, weight, eps)

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
        qkv = terms.added_to(qkv) if terms else qkv
        num_kv_heads, head_dim = kv.shape[3:]
        heads = qkv.view(len(qkv), -1, head_dim)
        num_q_heads = heads.shape[1] - 2 * num_kv_heads
        qk, v = heads.split((num_q_heads + num_kv_heads, num_kv_heads), dim=1)
        q, k = pointwise.rope(qk, cos[positions], sin[positions]).split((num_q_heads, num_kv_heads), dim=1)
        self.store_kv(k, v, kv, slots)
        return q

    def silu_mul(self, gate_up: Tensor, terms: LowRankTerms | None = None) -> Tensor:
        """See Ops.silu_mul."""
        return pointwise.silu_mul(terms.added_to(gate_up) if terms else gate_up)


def _segments(work: WorkList) -> list[list[int]]:
    """[slot, first_row, num_rows] of the segments in use, whose ranks are taken together however they are shared."""
    segments: list[list[int]] = work.segments[: int(work.num_segments)].tolist()
    return [row[:3] for row in segments if row[3:] in ([], [0])]


def _records(weights: AdapterWeights, slot: int, place: Place) -> list[list[int]]:
    """[rank, a_chunk, b_chunk] of the place's modules."""
    modules = place.group.value
    records: list[list[int]] = weights.modules[slot, place.layer, modules[0] : modules[-1] + 1].tolist()
    return records


def _matrices(weights: AdapterWeights, slot: int, places: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    """float32 [rank, row_elements] of each (rank, chunk, row_elements) with a rank; the rows' padding is left out.

    One gather serves them all: what one launch reads lies together in an adapter's stream.
    """
    ends = [(chunk * CHUNK, chunk * CHUNK + rank * padded(size)) for rank, chunk, size in places if rank]
    if not ends:
        return []
    cell_elements = weights.pool.shape[1]
    first_cell = min(start for start, _ in ends) // cell_elements
    end_cell = -(-max(end for _, end in ends) // cell_elements)
    stream = weights.gather(weights.cells[slot, first_cell:end_cell]).flatten()
    origin = first_cell * cell_elements
    return [
        stream[start - origin : end - origin].view(rank, padded(size))[:, :size].float()
        for (start, end), (rank, _, size) in zip(ends, [place for place in places if place[0]], strict=True)
    ]
