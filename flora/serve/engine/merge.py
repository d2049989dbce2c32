"""One adapter merged into the base when the engine starts: no row meets adapter arithmetic any more.

S-LoRA (arXiv:2311.03285, section 2 and figure 9) finds this the faster way for a single adapter, and for no more. What
cannot be applied beside the base's weights can be merged into them: embeddings, heads, and tensors carried whole.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flora import forms
from flora.adapter import Adapter, Module
from flora.checkpoint import Checkpoint
from flora.errors import AdapterInvalid, NotFinite, ShapeMismatch, Unsupported
from flora.identity import BaseRecord
from flora.lowrank import LowRank
from flora.registry import Registry
from flora.serve.engine.loading.binding import admit
from flora.serve.request import AdapterTarget


@dataclass(frozen=True, eq=False)
class MergedCheckpoint(Checkpoint):
    """A base whose changed tensors come as W + scale * B @ A in float32: whoever loads them rounds, once."""

    label: str = ""
    factors: dict[str, tuple[Module, LowRank]] = field(default_factory=dict)  # by the tensor's name
    whole: dict[str, Tensor] = field(default_factory=dict)  # what replaces the base's, by name
    loaded: set[str] = field(default_factory=set)  # changed tensors that were asked for

    def load(self, name: str) -> Tensor:
        """The merged tensor; one without a change as it is stored. Raises CheckpointError, ShapeMismatch, NotFinite."""
        if name in self.whole:
            self.loaded.add(name)
            merged = self.whole[name]
        elif name in self.factors:
            self.loaded.add(name)
            merged = self._merged(name, *self.factors[name])
        else:
            return super().load(name)
        if merged.shape != self.tensors[name].shape:
            raise ShapeMismatch(
                f"{name} is {list(merged.shape)} in adapter {self.label}, {list(self.tensors[name].shape)} in the base",
                tensor=name,
            )
        if not bool(torch.isfinite(merged).all()):
            raise NotFinite(f"{name} is not finite once {self.label} is merged into it", tensor=name)
        return merged

    def _merged(self, name: str, module: Module, factors: LowRank) -> Tensor:
        merged = super().load(name).to(torch.float32, copy=True)
        matrix = forms.as_matrix(module.kind, merged)  # a view
        if matrix.shape != (factors.out_features, factors.in_features):
            raise ShapeMismatch(
                f"{name} is {[factors.out_features, factors.in_features]} in adapter {self.label}, "
                f"{list(matrix.shape)} in the base",
                tensor=name,
            )
        matrix += factors.delta()
        return merged

    def check_all_loaded(self) -> None:
        """Raises Unsupported if the adapter changes a tensor that the model has never asked for."""
        own = {name for name, (module, _) in self.factors.items() if name.removesuffix(".weight") not in module.tied}
        for name in sorted((own | self.whole.keys()) - self.loaded):
            raise Unsupported(
                f"{name} of adapter {self.label} has no place in the served model",
                cause="the model ties it to another tensor, or does not use it",
                fix="serve the checkpoint that `flora merge` writes, if its architecture is served",
                tensor=name,
            )


def merge_into(
    base: Checkpoint, record: BaseRecord, registry: str, target: AdapterTarget, *, allow_base_mismatch: bool = False
) -> MergedCheckpoint:
    """The base with this adapter version in it; its weights are read when they are asked for.

    Raises AdapterNotFound, StoreError, BaseMismatch, Unsupported.
    """
    with Registry.open(registry) as store:
        version = store.by_digest(target.version_digest)
        if version.serving_digest != target.serving_digest:
            raise AdapterInvalid(
                f"{target.label} is another version in the registry by now", fix="start the server again"
            )
        adapter = store.load(version)
        admit(store, version, adapter.header, record, target.label, allow_mismatch=allow_base_mismatch)
    return MergedCheckpoint(
        path=base.path,
        config=base.config,
        tensors=base.tensors,
        label=target.label,
        factors=_by_tensor(adapter, base, target.label),
        whole=dict(adapter.exact),
    )


def _by_tensor(adapter: Adapter, base: Checkpoint, label: str) -> dict[str, tuple[Module, LowRank]]:
    """Each changed tensor with its module; a head that is its embedding stands for both."""
    found: dict[str, tuple[Module, LowRank]] = {}
    for module, factors in adapter:
        name = next((name for name in (f"{module.name}.weight", module.name) if name in base.tensors), None)
        if name is None:
            raise Unsupported(f"{module.name} of adapter {label} is not in the base", tensor=module.name)
        found[name] = module, factors
        for tied in module.tied:
            if f"{tied}.weight" in base.tensors:
                found[f"{tied}.weight"] = module, factors
    return found
