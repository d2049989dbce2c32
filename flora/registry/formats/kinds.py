"""Kinds of modules: the same place in every layer, and which layers lack one. Names only."""

import re
from collections.abc import Iterable
from itertools import product

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # a layer's or an expert's index within a module path


def kind_of(name: str) -> str:
    """The path with its indices as stars: model.layers.*.self_attn.q_proj."""
    return _NUMBER.sub("*", name)


def numbers_of(name: str) -> list[str]:
    """What stands in `name` where `kind_of` has stars."""
    return _NUMBER.findall(name)


def expected_modules(present: Iterable[str], known: Iterable[str] = ()) -> set[str]:
    """Every module of the kinds in `present`: those that are known, and all combinations of indices seen."""
    present = set(present)
    kinds = {kind_of(name) for name in present}
    expected = {name for name in known if kind_of(name) in kinds}
    layers: dict[str, set[str]] = {}  # of each stack, such as `model.layers.`
    for name in present:
        if match := _NUMBER.search(name):
            layers.setdefault(name[: match.start()], set()).add(match.group())
    for kind in kinds:
        members = [numbers_of(name) for name in present if kind_of(name) == kind]
        stem, *pieces = kind.split("*")
        if pieces:
            inner = [sorted({indices[i] for indices in members}) for i in range(1, len(pieces))]
            for indices in product(sorted(layers[stem]), *inner):
                expected.add(stem + "".join(index + piece for index, piece in zip(indices, pieces, strict=True)))
    return expected
