"""One decoder for Llama, Mistral, Qwen2 and Qwen3: a step's rows in, their logits out.

Rows are tokens of any sequences, packed without padding. Nothing here knows sequences or adapters apart: attention
finds its pages through the batch's block tables, LoRA its factors through the batch's work list.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flora.kernels import (
    AdapterWeights,
    Context,
    Group,
    LowRankTerms,
    Ops,
    PackedLinear,
    Place,
    SideStream,
    project,
    project_beside,
)
from flora.serve.engine.batch import Batch
from flora.serve.engine.model.config import ModelConfig
from flora.serve.engine.model.rope import rope_tables
from flora.serve.engine.model.weights import LayerWeights, ModelWeights
from flora.serve.engine.pool import DevicePool


class LlamaModel:
    """The base's weights and the walk through them."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, max_context: int, ops: Ops) -> None:
        self.config = config
        self.weights = weights
        self.ops = ops
        self._cos, self._sin = rope_tables(config.rope, config.head_dim, max_context, weights.embedding.device)
        self._softmax_scale = config.head_dim**-0.5
        device = weights.embedding.device
        self._side, self._urgent_side = SideStream(device), SideStream(device, urgent=True)
        q, kv, ff, hidden = config.q_size, config.kv_size, config.intermediate_size, config.hidden_size
        outputs = {
            Group.QKV: ((0, q, q + kv), (q, kv, kv)),
            Group.OUT: ((0,), (hidden,)),
            Group.GATE_UP: ((0, ff), (ff, ff)),
            Group.DOWN: ((0,), (hidden,)),
        }
        self._places = [
            {group: Place(layer, group, *where) for group, where in outputs.items()}
            for layer in range(len(weights.layers))
        ]

    def forward(self, batch: Batch, pool: DevicePool, adapters: AdapterWeights, logits: Tensor | None = None) -> Tensor:
        """Logits of the rows in `batch.logits_rows`, [len(logits_rows), vocab_size], in the model's dtype; KV goes to
        the pool.

        logits  where to leave them (None: in memory of their own)
        """
        weights, eps, ops = self.weights, self.config.rms_norm_eps, self.ops
        context = ops.plan_attention(batch.context, pool.geometry.page_tokens)
        x = F.embedding(batch.token_ids, weights.embedding)
        normed = ops.rms_norm(x, weights.layers[0].input_norm, eps)
        next_norms = [layer.input_norm for layer in weights.layers[1:]] + [weights.norm]
        for index, (layer, next_norm) in enumerate(zip(weights.layers, next_norms, strict=True)):
            places = self._places[index]
            attended = self._attention(normed, index, layer, batch, context, pool, adapters)
            attended, terms = self._project(layer.o, attended, places[Group.OUT], batch, adapters)
            normed = ops.add_rms_norm(x, attended, layer.post_norm, eps, terms)
            gate_up, terms = self._project(layer.gate_up, normed, places[Group.GATE_UP], batch, adapters)
            activated = ops.silu_mul(gate_up, terms)
            down, terms = self._project(layer.down, activated, places[Group.DOWN], batch, adapters)
            normed = ops.add_rms_norm(x, down, next_norm, eps, terms)
        return weights.head.into(logits, normed[batch.logits_rows])

    def _attention(
        self,
        x: Tensor,
        index: int,
        layer: LayerWeights,
        batch: Batch,
        context: Context,
        pool: DevicePool,
        adapters: AdapterWeights,
    ) -> Tensor:
        config, kv = self.config, pool.kv(index)
        is_normed = layer.q_norm is not None
        qkv, terms = self._project(layer.qkv, x, self._places[index][Group.QKV], batch, adapters, beside=not is_normed)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k, v = qkv.split((config.q_size, config.kv_size, config.kv_size), dim=1)
            q = self.ops.rms_norm(q.reshape(len(x), -1, config.head_dim), layer.q_norm, config.rms_norm_eps)
            k = self.ops.rms_norm(k.reshape(len(x), -1, config.head_dim), layer.k_norm, config.rms_norm_eps)
            qkv = torch.cat((q.flatten(1), k.flatten(1), v), dim=1)
        q = self.ops.rope_store(qkv, batch.positions, self._cos, self._sin, kv, batch.slots, terms)
        attended = self.ops.paged_attention(q, kv, context, self._softmax_scale)
        return attended.reshape(len(x), config.q_size)

    def _project(
        self,
        linear: PackedLinear,
        x: Tensor,
        place: Place,
        batch: Batch,
        adapters: AdapterWeights,
        *,
        beside: bool = True,
    ) -> tuple[Tensor, LowRankTerms | None]:
        """The base's product, with the low-rank terms of its rows' adapters, or beside them where the batch says so."""
        work = batch.work if place.group in batch.groups else ()
        if beside and work and batch.adapter_rows is not None:
            side = self._urgent_side if len(x) == 1 else self._side
            return project_beside(self.ops, side, linear, x, adapters, place, work, batch.adapter_rows)
        return project(self.ops, linear, x, adapters, place, work, self._side), None
