"""An adapter against the record of its base: whether each module is there in the shape that the factors have.

PEFT's config only claims a base by name. The base's own record says which weights those are, and an import is bound to
them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import msgspec

from flora.adapter import Adapter, AdapterHeader, BaseBinding, Module
from flora.errors import BaseMismatch
from flora.forms import EXPERT_KINDS, matrix_shape, weight_name
from flora.identity import BaseRecord, TensorRecord

_Tensors = Mapping[str, TensorRecord]


@dataclass(frozen=True, slots=True)
class Misfit:
    """A part of the adapter that the base has no place for."""

    name: str  # of the module or tensor
    wanted: tuple[int, ...]  # [out, in] of a module; of a tensor that is carried whole, its shape
    found: tuple[int, ...] | None  # shape of the base's tensor; None: there is none

    def __str__(self) -> str:
        found = f"has it as {list(self.found)}" if self.found is not None else "has none"
        return f"{self.name} is {list(self.wanted)} in the adapter, and its base {found}"


def misfits(header: AdapterHeader, record: BaseRecord) -> Iterator[Misfit]:
    """Every module and whole tensor of the adapter that the base lacks or has in another shape."""
    tensors = {tensor.name: tensor for tensor in record.tensors}
    for module in header.modules:
        tensor, wanted = _weight(module, tensors), (module.out_features, module.in_features)
        if tensor is None or len(tensor.shape) < 2 or _own_shape(module, tensor.shape) != wanted:
            yield Misfit(module.name, wanted, tensor.shape if tensor else None)
    for exact in header.exact_tensors:
        tensor = tensors.get(exact.name)
        num_kept = 0 if exact.first_row is None else 1  # a table's new rows are as wide as its old ones, no more
        if tensor is None or tensor.shape[num_kept:] != exact.shape[num_kept:]:
            yield Misfit(exact.name, exact.shape, tensor.shape if tensor else None)


def altered(header: AdapterHeader, record: BaseRecord) -> Iterator[str]:
    """Every tensor of the base that the adapter says it was made from with other bytes than the base has."""
    hashes = record.hashes()
    yield from (name for name, sha256 in header.base.touched.items() if hashes.get(name) != sha256)


def belongs(header: AdapterHeader, record: BaseRecord) -> bool:
    """Whether the base has a place for all of the adapter, and the tensors that it was made from."""
    return next(misfits(header, record), None) is None and next(altered(header, record), None) is None


def bind(adapter: Adapter, record: BaseRecord, name: str, architecture: str = "unknown") -> Adapter:
    """The adapter bound to the base of `record`, which is called `name`, with the hashes of the tensors it touches.

    Raises BaseMismatch if that base lacks a module of the adapter, or has it in another shape.
    """
    header = adapter.header
    if misfit := next(misfits(header, record), None):
        found = f"has it as {list(misfit.found)}" if misfit.found is not None else "has no such module"
        raise BaseMismatch(
            f"{misfit.name} is {list(misfit.wanted)} in the adapter; {name} {found}",
            cause="the adapter was made for another base",
            fix=f"give the base that it names: {header.base.name}",
            tensor=misfit.name,
        )
    tensors = {tensor.name: tensor for tensor in record.tensors}
    changed = [_weight(module, tensors) for module in header.modules]
    changed += [tensors[exact.name] for exact in header.exact_tensors]
    touched = {tensor.name: tensor.sha256 for tensor in changed if tensor}
    base = BaseBinding(name=name, base_id=str(record.base_id), architecture=architecture, touched=touched)
    return replace(adapter, header=msgspec.structs.replace(header, base=base))


def _weight(module: Module, tensors: _Tensors) -> TensorRecord | None:
    name = weight_name(module.name, module.kind, tensors)
    return tensors[name] if name is not None else None


def _own_shape(module: Module, shape: tuple[int, ...]) -> tuple[int, int]:
    """[out, in] of the module in a tensor of `shape`."""
    if module.kind not in EXPERT_KINDS or len(shape) == 2:
        return matrix_shape(module.kind, shape)
    if len(shape) == 4:  # MXFP4: blocks of 16 bytes, two numbers each
        return shape[1], 32 * shape[2]
    return (shape[2], shape[1]) if module.kind == "expert_transposed" else (shape[1], shape[2])
