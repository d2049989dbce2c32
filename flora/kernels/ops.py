"""What a model calls between its base products, each with a plain-torch and a Triton implementation."""

from typing import Protocol

from torch import Tensor

from flora.kernels.context import Context
from flora.kernels.modules import Place
from flora.kernels.terms import LowRankTerms
from flora.kernels.weights import AdapterWeights
from flora.kernels.work import WorkList


class Ops(Protocol):
    """ReferenceOps and TritonOps. The caller picks one by name; neither ever falls back to the other."""

    name: str  # "reference" or "triton", for metrics

    def lora_shrink(self, x: Tensor, weights: AdapterWeights, place: Place, work: WorkList) -> Tensor:
        """v: x[i] @ A_s.T for each slice s of the place's group and each row i of a segment, in float32.

        x        [n, in_features], contiguous
        returns  a buffer whose layout is the implementation's own business: only its own lora_expand reads it. What no
                 row's ranks reach is never written and never read.
        """
        ...

    def lora_expand(
        self, y: Tensor, v: Tensor, weights: AdapterWeights, place: Place, work: WorkList, *, add: bool = True
    ) -> None:
        """y[i, place.out_starts[s] : + place.out_sizes[s]] += scale_s * v[i, s] @ B_s.T, in place.

        y  [n, out_total], contiguous; float32 inside, one rounding to y's dtype. Rows in no segment keep their bits.
           Written before lora_shrink is called and by nothing in between: on a GPU the two overlap.
        v  what lora_shrink returned for the same weights and place, and for the same rows (LoraWork)
        add  False: = instead of +=, and 0 where a row's adapter leaves out the module
        """
        ...

    def store_kv(self, k: Tensor, v: Tensor, kv: Tensor, slots: Tensor) -> None:
        """kv[slot // page_tokens, 0 or 1, slot % page_tokens] = k[i] or v[i], in place; rows with slot < 0 are skipped.

        k, v   [n, num_kv_heads, head_dim], last dimension contiguous
        kv     [num_pages, 2, page_tokens, num_kv_heads, head_dim], one layer's plane, last dimension contiguous
        slots  int64 [n]
        """
        ...

    def plan_attention(self, context: Context, page_tokens: int) -> Context:
        """The context with all that is the same in every layer worked out: once a step, before paged_attention. Without
        it each call does so for itself.
        """
        ...

    def paged_attention(self, q: Tensor, kv: Tensor, context: Context, softmax_scale: float) -> Tensor:
        """Causal attention of each sequence's last tokens over its whole context, which store_kv has already stored.

        q        [n, num_q_heads, head_dim]; num_q_heads is a multiple of num_kv_heads
        returns  [n, num_q_heads, head_dim] in q's dtype; zeros for rows of a sequence with seq_len 0.
        """
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """weight * x / sqrt(mean(x**2) + eps) over the last dimension; see pointwise.rms_norm for the roundings."""
        ...

    def add_rms_norm(
        self, x: Tensor, delta: Tensor, weight: Tensor, eps: float, terms: LowRankTerms | None = None
    ) -> Tensor:
        """x += delta in place, then the norm of the sum; x, delta [n, size], contiguous.

        terms  here and below: what the product still lacks, added first and rounded to its dtype
        """
        ...

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
        """Rotates q and k by their positions and stores k and v in the paged cache; returns q.

        qkv        [n, (num_q_heads + 2 * num_kv_heads) * head_dim], contiguous; q may be rotated where it lies
        positions  int64 [n];  cos, sin  float32 [max_context, head_dim / 2]
        kv, slots  as in store_kv
        returns    [n, num_q_heads, head_dim]
        """
        ...

    def silu_mul(self, gate_up: Tensor, terms: LowRankTerms | None = None) -> Tensor:
        """silu(gate) * up, [n, size], for gate_up [n, 2 * size], gate first."""
        ...
