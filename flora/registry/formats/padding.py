"""What the portable profile adds to an adapter's own factors, as zeros: ranks, names and shapes alone.

Other layers' modules of each kind that the adapter has: LoRAX drops a kind that one layer lacks. And the partners of
layers that an engine joins, where it would read a tensor that is not there: SGLang makes one matrix of q, k, v and one
of gate, up; a k that no module of the layer has it takes for zeros, and so an up.
Source: sglang 0.5.23, srt/lora/lora.py; lorax, server/lorax_server/adapters/lora.py.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flora.adapter import AdapterHeader, ChangeReport
from flora.forms import EXPERT_KINDS, is_expert
from flora.registry.formats.kinds import expected_modules, kind_of, numbers_of

Shape = tuple[int, int]  # [out, in]
_TWINS = {"k_proj": "v_proj", "v_proj": "k_proj", "gate_proj": "up_proj", "up_proj": "gate_proj"}  # of one shape


@dataclass(frozen=True, slots=True)
class Padding:
    """The modules to add to an adapter's own."""

    layers: dict[str, Shape]  # of kinds that the adapter has, in layers that lack them
    partners: dict[str, Shape]  # of kinds that it has nowhere, beside what they are joined with
    lacking: frozenset[str]  # leaves of partners that cannot be added: no such matrix, or nobody knows its shape


def padding_of(header: AdapterHeader, report: ChangeReport | None, paths: Mapping[str, str] | None = None) -> Padding:
    """What the portable profile adds to the adapter of that header.

    report  lists the base's matrices, if Flora extracted the adapter; without it, shapes are those of other modules
    paths   under which names the header has modules of the report: `paths.tree_paths`
    """
    base = _translated(_shapes(report), paths or {})
    is_whole = header.recipe.tuned_id is not None  # then the report lists whatever the base has
    own = {module.name: (module.out_features, module.in_features) for module in header.modules}
    kinds = {kind_of(module.name): module for module in header.modules}
    layers = {}
    for name in sorted(expected_modules(own, base) - own.keys()):
        sibling = kinds[kind_of(name)]
        is_matrix = sibling.kind == "linear"  # others' tensors are no such matrices
        if sibling.kind not in EXPERT_KINDS and (name in base or not is_whole or not is_matrix):  # a stack pads itself
            usual = (sibling.out_features, sibling.in_features)
            layers[name] = base.get(name, usual) if is_matrix else usual
    linear = {name: shape for name, shape in (own | layers).items() if kinds[kind_of(name)].kind == "linear"}
    partners: dict[str, Shape] = {}
    lacking = set()
    for name in missing_partners(linear):
        parent, _, leaf = name.rpartition(".")
        twin = None if is_whole or leaf not in _TWINS else linear.get(f"{parent}.{_TWINS[leaf]}")
        if shape := base.get(name, twin):
            partners[name] = shape
        else:
            lacking.add(leaf)
    return Padding(layers, partners, frozenset(lacking))


def portable_rank(header: AdapterHeader) -> int:
    """The rank of every module in the portable profile: the largest, rounded up to one that LoRAX keeps.

    It pads to these, and then divides alpha by the padded rank in all kinds of modules but the first. Experts, which
    it does not serve, stay as they are: all of a layer count.   Source: lorax, utils/sgmv.py and adapters/lora.py.
    """
    rank = header.max_rank
    if any(is_expert(module.name) or module.kind == "parameter" for module in header.modules):
        return rank
    return 8 if rank <= 8 else -(-rank // 16) * 16


def missing_partners(names: Iterable[str]) -> list[str]:
    """The modules that SGLang would read beside those in `names`, and that are not there."""
    leaves: dict[str, set[str]] = {}
    for name in names:
        if not is_expert(name):
            parent, _, leaf = name.rpartition(".")
            leaves.setdefault(parent, set()).add(leaf)
    missing = []
    for parent, found in sorted(leaves.items()):
        wanted = set()
        if found & {"q_proj", "k_proj", "v_proj"}:
            wanted |= {"q_proj", "v_proj"}
        if "up_proj" in found:
            wanted |= {"gate_proj"}
        missing += [f"{parent}.{leaf}" for leaf in sorted(wanted - found)]
    return missing


def _shapes(report: ChangeReport | None) -> dict[str, Shape]:
    """[out, in] of every matrix that the report lists, by module: it lists the layers that did not change, too."""
    return {
        tensor.name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for tensor in (report.tensors if report else ())
        if tensor.name.endswith(".weight") and len(tensor.shape) == 2
    }


def _translated(shapes: dict[str, Shape], paths: Mapping[str, str]) -> dict[str, Shape]:
    """The shapes under the names of `paths`, by which each kind of module tells the names of its kind."""
    kinds = {kind_of(name): kind_of(path) for name, path in paths.items()}
    parents = {_parent(kind): _parent(other) for kind, other in kinds.items() if _leaf(kind) == _leaf(other)}
    found = {}
    for name, shape in shapes.items():
        kind = kind_of(name)
        other = kinds.get(kind) or (f"{parents[_parent(kind)]}.{_leaf(kind)}" if _parent(kind) in parents else kind)
        found[paths.get(name) or _with_numbers(other, numbers_of(name), name)] = shape
    return found


def _with_numbers(kind: str, numbers: list[str], name: str) -> str:
    pieces = kind.split("*")
    if len(pieces) != len(numbers) + 1:
        return name
    return pieces[0] + "".join(number + piece for number, piece in zip(numbers, pieces[1:], strict=True))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
