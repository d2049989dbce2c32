"""Experts as PEFT stacks them, where a library keeps those of a layer in one parameter [experts, …].

    M.experts.base_layer.lora_A.weight [experts * r, hidden]    of gate_up_proj, every expert's A below the other's
    M.experts.base_layer.lora_B.weight [2 * ff, r * experts]    column k * experts + e is column k of expert e's B
    M.experts.lora_A.weight, …lora_B.weight                     of down_proj, which PEFT wraps around the other

Where one of the two is not adapted, the other has no `base_layer`. vLLM reads the same names. PEFT takes a parameter to
be [experts, out, in] unless its class says otherwise; Llama 4's is [experts, in, out] and does not say so: there A and
B trade places.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flora.errors import AdapterInvalid
from flora.forms import EXPERT_KINDS, Form, split_expert
from flora.registry.formats.spelling import PREFIX

if TYPE_CHECKING:
    from torch import Tensor

    from flora.lowrank import LowRank

_SWAPPED = ("Llama4",)  # how architectures start whose experts' class does not say that they lie transposed
_OUTER = "down_proj"


@dataclass(frozen=True, slots=True)
class Stack:
    """The experts of one parameter."""

    parameter: str  # M.experts.down_proj, as PEFT's target_parameters names it
    path: str  # of the tensors, without PEFT's prefix
    members: tuple[str, ...]  # modules M.experts.0.down_proj and on, adapted or not
    is_swapped: bool = False

    @property
    def names(self) -> tuple[str, str]:
        return f"{PREFIX}{self.path}.lora_A.weight", f"{PREFIX}{self.path}.lora_B.weight"


def stacks_of(forms: Mapping[str, Form], architecture: str) -> list[Stack]:
    """The parameters to which modules of these forms belong, in the order of names."""
    homes: dict[str, int] = {}  # the number of experts of each M.experts
    leaves: set[str] = set()  # adapted in any layer, and so in all
    for module, form in forms.items():
        if form.kind in EXPERT_KINDS:
            parent, _, leaf = split_expert(module)
            homes[f"{parent}.experts"] = form.experts
            leaves.add(leaf)
    is_swapped = architecture.startswith(_SWAPPED)
    return [
        Stack(
            parameter=f"{home}.{leaf}",
            path=f"{home}.base_layer" if leaf != _OUTER and _OUTER in leaves else home,
            members=tuple(f"{home}.{index}.{leaf}" for index in range(num_experts)),
            is_swapped=is_swapped,
        )
        for home, num_experts in sorted(homes.items())
        for leaf in sorted(leaves)
    ]


def spell_stack(stack: Stack, factors: "Mapping[str, LowRank]") -> "dict[str, Tensor]":
    """The stack's two tensors; experts that have no factors get zeros. All factors are of one rank and one dtype."""
    import torch

    one = next(factors[name] for name in stack.members if name in factors)
    halves_a = [factors[name].A if name in factors else torch.zeros_like(one.A) for name in stack.members]
    halves_b = [factors[name].B if name in factors else torch.zeros_like(one.B) for name in stack.members]
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
        if A is None or B is None or A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or A.shape[0] % size:
            raise AdapterInvalid(
                f"{stack.parameter} has no factors of {size} experts in the weights",
                cause="the weights are damaged, or the record beside them belongs to other weights",
                tensor=name_a,
            )
        for index, member in enumerate(stack.members):
            own_a, own_b = A[index * (len(A) // size) : (index + 1) * (len(A) // size)], B[:, index::size]
            if stack.is_swapped:
                own_a, own_b = own_b.T, own_a.T
            tensors[f"{PREFIX}{member}.lora_A.weight"] = own_a.contiguous()
            tensors[f"{PREFIX}{member}.lora_B.weight"] = own_b.contiguous()
