"""What PEFT is told to adapt: modules by name, and parameters where no layer of a kind that it knows holds the weight.

Since transformers 5 the experts of a layer are one parameter, `M.experts.gate_up_proj`, whatever the checkpoint keeps.
PEFT fuses factors of separate experts while it loads them, gate and up side by side and so of twice the rank, but it
translates the configuration for some families only: so the configuration names both the experts and the parameter.
Where it does translate, it takes every layer called like an expert's for one; plain layers of such names (a shared
expert, a dense first block) are therefore told as parameters, which they are as well.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from flora.adapter import Adapter
from flora.forms import EXPERT_KINDS, LINEAR, Form, is_expert, split_expert
from flora.registry.formats.stacks import members_of, stacks_of

_FUSED = {  # what becomes of separate experts' matrices in the module tree
    "gate_proj": "experts.gate_up_proj",
    "up_proj": "experts.gate_up_proj",
    "down_proj": "experts.down_proj",
    "w1": "experts.gate_up_proj",
    "w3": "experts.gate_up_proj",
    "w2": "experts.down_proj",
}
_TWICE = "experts.gate_up_proj"


def find_targets(adapter: Adapter, forms: Mapping[str, Form], *, short: bool = False) -> dict[str, Any]:
    """target_modules and what belongs to it: entries of PEFT's configuration for modules of these forms.

    short  names that fit every layer, as readers of the portable profile want them, instead of whole paths
    """
    stacks = stacks_of(adapter.header.forms, adapter.header.base.architecture)
    stacked = members_of(stacks)
    separate = {name for name in forms if is_expert(name) and name not in stacked}
    leaves = _leaves_of_experts(adapter)
    aside = {
        name
        for name, form in forms.items()
        if form.kind == "parameter" or (form == LINEAR and not is_expert(name) and _leaf(name) in leaves)
    }
    names = {name for name in forms if name not in aside and name not in stacked}
    tied = {name for module in names for name in forms[module].tied}
    parameters = {stack.parameter for stack in stacks}
    fused = {_FUSED[leaf] for leaf in map(_leaf, separate) if leaf in _FUSED}
    clash = any(forms[name].kind == "linear" for name in aside)
    targets: dict[str, Any] = {
        "target_modules": sorted(_short(names | tied, clash=clash) if short else names | tied),
    }
    if found := sorted(parameters | fused | {f"{name}.weight" for name in aside}):
        targets["target_parameters"] = found
    if _TWICE in fused or any(stack.num_parts > 1 for stack in stacks):
        twice = {_TWICE.replace(".", r"\."): 2 * max(adapter.header.max_rank, 1)}
        targets |= {"rank_pattern": twice, "alpha_pattern": twice}
    return targets


def _short(names: Iterable[str], *, clash: bool) -> set[str]:
    """The last parts of paths; of an expert more where a plain layer has the same last part."""
    return {
        f"experts.{split_expert(name)[1]}.{_leaf(name)}" if clash and is_expert(name) else _leaf(name) for name in names
    }


def _leaves_of_experts(adapter: Adapter) -> set[str]:
    """What layers are called that PEFT may take for experts: as those are that have tensors of their own.

    Where the checkpoint has them fused [experts, out, in], others of its family may have them apart.
    """
    kinds = {form.kind for form in adapter.header.forms.values()}
    if kinds.intersection(EXPERT_KINDS):
        return set(_FUSED) if "expert" in kinds else set()
    tensors = adapter.report.tensors if adapter.report else ()
    known = {tensor.name.removesuffix(".weight") for tensor in tensors if len(tensor.shape) == 2}
    return {_leaf(name) for name in known | adapter.factors.keys() if is_expert(name)}


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
