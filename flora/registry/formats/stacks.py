"""Experts as PEFT stacks them, where a library keeps those of a layer in one parameter [experts, …].

    M.experts.base_layer.lora_A.weight [experts * r, hidden]    of gate_up_proj, every expert's A below the other's
    M.experts.base_layer.lora_B.weight [2 * ff, r * experts]    column k * experts + e is column k of expert e's B
    M.experts.lora_A.weight, …lora_B.weight                     of down_proj, which PEFT wraps around the other

Where one of the two is not adapted, the other has no `base_layer`. JetMoE's two are modules of their own, whose tensors
are M.input_linear.lora_A.weight and so on. vLLM reads the same names. PEFT takes a parameter to
be [experts, out, in] unless its class says otherwise; Llama 4's is [experts, in, out] and does not say so: there A and
B trade places.

Experts that the checkpoint keeps apart stay apart in the folder: PEFT fuses their factors, and vLLM reads them so. Of
models that also see or hear, and of Nemotron-H, it knows no such conversion, and there they are fused here: gate's and
up's factors, r each, lie side by side in one pair of 2 * r, the one's rows of B above the other's.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flora.errors import AdapterInvalid
from flora.forms import EXPERT_KINDS, Form, split_expert
from flora.registry.formats.spelling import PREFIX

if TYPE_CHECKING:
    from torch import Tensor

    from flora.lowrank import LowRank

_SWAPPED = ("Llama4",)  # how architectures start whose experts' class does not say that they lie transposed
_SENSING = "ForConditionalGeneration"  # how architectures end of models that see or hear, and talk
_GATELESS = ("NemotronH",)  # how architectures start whose experts have no gate: up_proj is a parameter of its own
_OUTER = "down_proj"
_MODULES = ("input_linear", "output_linear")  # leaves that are modules, whose `weight` is the parameter
_APART = {
    "gate_up_proj": ("gate_proj", "up_proj")
}  # what one matrix of the module tree is in files of separate experts


@dataclass(frozen=True, slots=True)
class Stack:
    """The experts of one parameter."""

    parameter: str  # M.experts.down_proj, as PEFT's target_parameters names it
    path: str  # of the tensors, without PEFT's prefix
    members: tuple[
        tuple[str, ...], ...
    ]  # of each expert the modules that lie in it one below the other, adapted or not
    is_swapped: bool = False

    @property
    def names(self) -> tuple[str, str]:
        return f"{PREFIX}{self.path}.lora_A.weight", f"{PREFIX}{self.path}.lora_B.weight"

    @property
    def num_parts(self) -> int:
        return len(self.members[0])


def stacks_of(forms: Mapping[str, Form], architecture: str) -> list[Stack]:
    """The parameters to which modules of these forms belong, in the order of names."""
    homes: dict[str, int] = {}  # the number of experts of each M.experts
    parts: dict[str, tuple[str, ...]] = {}  # adapted in any layer, and so in all
    for module, form in forms.items():
        is_gateless = architecture.startswith(_GATELESS)
        if form.experts and (form.kind in EXPERT_KINDS or architecture.endswith(_SENSING) or is_gateless):
            parent, _, leaf = split_expert(module)
            homes[f"{parent}.experts"] = form.experts
            is_whole = form.kind in EXPERT_KINDS or is_gateless
            fused = next((whole for whole, apart in _APART.items() if leaf in apart and not is_whole), leaf)
            parts[fused] = _APART.get(fused, (leaf,)) if not is_whole else (leaf,)
    return [
        Stack(
            **_place(home, leaf, is_inner=leaf != _OUTER and _OUTER in parts),
            members=tuple(tuple(f"{home}.{index}.{part}" for part in parts[leaf]) for index in range(num_experts)),
            is_swapped=architecture.startswith(_SWAPPED),
        )
        for home, num_experts in sorted(homes.items())
        for leaf in sorted(parts)
    ]


def _place(home: str, leaf: str, *, is_inner: bool) -> dict[str, str]:
    """`parameter` and `path` of the stack of those leaves. PEFT wraps one parameter of a module around the other."""
    if leaf in _MODULES:
        path = f"{home.removesuffix('.experts')}.{leaf}"
        return {"parameter": f"{path}.weight", "path": path}
    return {"parameter": f"{home}.{leaf}", "path": f"{home}.base_layer" if is_inner else home}


def members_of(stacks: Iterable[Stack]) -> set[str]:
    """Every module that lies in one of the stacks."""
    return {module for stack in stacks for expert in stack.members for module in expert}


def spell_stack(stack: Stack, factors: "Mapping[str, LowRank]") -> "dict[str, Tensor]":
    """The stack's two tensors; experts that have no factors get zeros. All factors are of one rank and one dtype."""
    import torch

    one = next(factors[name] for expert in stack.members for name in expert if name in factors)
    zeros = replace(one, A=torch.zeros_like(one.A), B=torch.zeros_like(one.B))
    own = [[factors.get(name, zeros) for name in expert] for expert in stack.members]
    halves_a = [torch.cat([part.A for part in expert]) for expert in own]
    halves_b = [torch.block_diag(*(part.B for part in expert)).to(one.B.dtype) for expert in own]
    if stack.is_swapped:
        halves_a, halves_b = [B.T for B in halves_b], [A.T for A in halves_a]
    name_a, name_b = stack.names
    return {name_a: torch.cat(halves_a).contiguous(), name_b: torch.stack(halves_b, -1).flatten(1).contiguous()}


def unstack(tensors: "dict[str, Tensor]", stacks: Iterable[Stack]) -> None:
    """Replaces the tensors of each stack by those of its experts, under the names of linear layers.

    Raises AdapterInvalid if one is missing or has another shape.
    """
    for stack in stacks:
        name_a, name_b = stack.names
        A, B = tensors.pop(name_a, None), tensors.pop(name_b, None)
        size = len(stack.members)
        if (
            A is None
            or B is None
            or (A.ndim, B.ndim) != (2, 2)
            or A.shape[0] != B.shape[1]
            or A.shape[0] % (size * stack.num_parts)
            or B.shape[0] % stack.num_parts
        ):
            raise AdapterInvalid(
                f"{stack.parameter} has no factors of {size} experts in the weights",
                cause="the weights are damaged, or the record beside them belongs to other weights",
                tensor=name_a,
            )
        for index, expert in enumerate(stack.members):
            own_a, own_b = A.chunk(size)[index], B[:, index::size]
            if stack.is_swapped:
                own_a, own_b = own_b.T, own_a.T
            _take_apart(tensors, expert, own_a, own_b)


def _take_apart(tensors: "dict[str, Tensor]", expert: tuple[str, ...], A: "Tensor", B: "Tensor") -> None:
    rank, out_features = len(A) // len(expert), len(B) // len(expert)
    for part, module in enumerate(expert):
        columns, rows = slice(part * rank, (part + 1) * rank), slice(part * out_features, (part + 1) * out_features)
        if B[rows, : columns.start].any() or B[rows, columns.stop :].any():
            raise AdapterInvalid(f"{module} reaches into another's factors in the weights", tensor=module)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = A[columns].contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = B[rows, columns].contiguous()
