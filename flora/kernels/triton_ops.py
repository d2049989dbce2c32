"""Every operation as Triton kernels: the GPU path."""

from dataclasses import replace

import torch
from torch import Tensor

from flora.kernels import fused
from flora.kernels.context import Context
from flora.kernels.decode_attention import decode_attention
from flora.kernels.decode_parts import list_decode_parts
from flora.kernels.kv_store import store_kv
from flora.kernels.lora_expand import lora_expand
from flora.kernels.lora_shrink import lora_shrink
from flora.kernels.modules import Place
from flora.kernels.prefill_attention import prefill_attention
from flora.kernels.terms import LowRankTerms
from flora.kernels.tuning import Tuning, can_overlap
from flora.kernels.weights import AdapterWeights
from flora.kernels.work import WorkList


class TritonOps:
    """Ops for one GPU. Nothing waits for the device and no grid depends on its data, so all of it can be captured."""

    name = "triton"

    def __init__(
        self, num_sms: int, tuning: Tuning | None = None, *, overlap: bool = False, batch_invariant: bool = False
    ) -> None:
        """batch_invariant  a token's attention has the same bits in a chunk of any size and as a single query"""
        self.num_sms = num_sms  # multiprocessors
        self.tuning = tuning or Tuning()
        self.batch_invariant = batch_invariant
        self.overlap = overlap  # launches start while the ones before them end: can_overlap
        self._arrivals: list[Tensor] = []

    @classmethod
    def for_device(
        cls, device: torch.device, tuning: Tuning | None = None, *, batch_invariant: bool = False
    ) -> "TritonOps":
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        return cls(sms, tuning, overlap=can_overlap(device), batch_invariant=batch_invariant)

    def lora_shrink(self, x: Tensor, weights: AdapterWeights, place: Place, work: WorkList) -> Tensor:
        """See Ops.lora_shrink."""
        tuning = self.tuning.of_list(work.block_rows, work.room, are_fp8=weights.are_fp8)
        return lora_shrink(x, weights, place, work, tuning, num_sms=self.num_sms, overlap=self.overlap)

    def lora_expand(
        self, y: Tensor, v: Tensor, weights: AdapterWeights, place: Place, work: WorkList, *, add: bool = True
    ) -> None:
        """See Ops.lora_expand."""
        tuning = self.tuning.of_list(work.block_rows, work.room, are_fp8=weights.are_fp8)
        lora_expand(y, v, weights, place, work, tuning, num_sms=self.num_sms, overlap=self.overlap, add=add)

    def store_kv(self, k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> None:
        """See Ops.store_kv."""
        store_kv(k, v, kv, slots)

    def plan_attention(self, context: Context, page_tokens: int) -> Context:
        """See Ops.plan_attention."""
        if self.batch_invariant:
            return context
        decode = self.tuning.decode
        parts = list_decode_parts(context, page_tokens, decode.split_tokens, decode.block_tokens, decode.uncut_tokens)
        return replace(context, parts=parts)

    def paged_attention(self, q: Tensor, kv: Tensor, context: Context, softmax_scale: float) -> Tensor:
        """See Ops.paged_attention. One-query sequences go the same way in every batch: their bits do not change."""
        out = torch.empty_like(q)
        if not self.batch_invariant:
            planned = context if context.parts else self.plan_attention(context, kv.shape[2])
            assert planned.parts is not None
            decode_attention(
                out,
                q,
                kv,
                planned,
                planned.parts,
                softmax_scale,
                self.tuning.decode,
                self._zeros(len(context.block_tables) * kv.shape[3], q.device),
                num_sms=self.num_sms,
                overlap=self.overlap,
            )
        if self.batch_invariant or context.max_queries != 1:
            prefill_attention(
                out,
                q,
                kv,
                context,
                softmax_scale,
                self.tuning.prefill,
                min_queries=1 if self.batch_invariant else 2,
                num_sms=self.num_sms,
                overlap=self.overlap,
            )
        return out

    def _zeros(self, count: int, device: torch.device) -> Tensor:
        """For decode_attention's arrivals: the same memory in every launch, each of which leaves zeros there.

        A step runs once before it is captured, so no graph takes or zeroes it. What graphs know is kept.
        """
        if not self._arrivals or len(self._arrivals[-1]) < count:
            self._arrivals.append(torch.zeros(count, dtype=torch.int32, device=device))
        return self._arrivals[-1]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See Ops.rms_norm."""
        return fused.rms_norm(x, weight, eps, overlap=self.overlap)

    def add_rms_norm(
        self, x: Tensor, delta: Tensor, weight: Tensor, eps: float, terms: LowRankTerms | None = None
    ) -> Tensor:
        """See Ops.add_rms_norm."""
        return fused.add_rms_norm(x, delta, weight, eps, terms, overlap=self.overlap)

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
        return fused.rope_store(qkv, positions, cos, sin, kv, slots, terms, overlap=self.overlap)

    def silu_mul(self, gate_up: Tensor, terms: LowRankTerms | None = None) -> Tensor:
        """See Ops.silu_mul."""
        return fused.silu_mul(gate_up, terms, overlap=self.overlap)
