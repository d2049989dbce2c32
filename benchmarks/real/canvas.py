"""One base model in memory, on which one adapter after the other is merged by hand: W + scale * B @ A, in float32."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from flora.adapter import Adapter
from flora.algebra.places import as_matrix, tensor_name
from flora.checkpoint import Checkpoint


class Canvas:
    """The base, in float32 on a device. What is merged is taken out again, to the bit."""

    def __init__(self, base: Path, device: str) -> None:
        self.model: nn.Module = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device).eval()
        # a tied table is one parameter here, so what an adapter adds to it is added once
        self._weights = dict(self.model.named_parameters())

    @contextmanager
    def with_adapter(self, adapter: Adapter) -> Iterator[nn.Module]:
        """The model with the adapter's factors added and its whole tensors in place."""
        assert not adapter.header.first_rows, "tables that have grown are not studied here"
        named = {tensor_name(module, self._weights): (module, factors) for module, factors in adapter}
        with self._changed([*named, *adapter.exact]) as weights:
            for name, (module, factors) in named.items():
                device = weights[name].device
                A, B = factors.A.to(device).float(), factors.B.to(device).float()
                as_matrix(weights[name].data, module).addmm_(B, A, alpha=factors.scale)
            for name, tensor in adapter.exact.items():
                weights[name].data.copy_(tensor)
            yield self.model

    @contextmanager
    def with_tensors(self, tuned: Checkpoint, names: Iterable[str]) -> Iterator[nn.Module]:
        """The model with these tensors of the tuned checkpoint in place of its own."""
        with self._changed(names) as weights:
            for name, weight in weights.items():
                weight.data.copy_(tuned.load(name))
            yield self.model

    @contextmanager
    def _changed(self, names: Iterable[str]) -> Iterator[Mapping[str, nn.Parameter]]:
        before: dict[str, Tensor] = {name: self._weights[name].data.clone() for name in names}
        try:
            yield {name: self._weights[name] for name in before}
        finally:
            for name, tensor in before.items():
                self._weights[name].data.copy_(tensor)
