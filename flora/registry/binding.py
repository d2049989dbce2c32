"""Proving an import's base: PEFT's config only claims a name; the base's own record says which weights those are."""

import msgspec

from flora.adapter import Adapter, BaseBinding
from flora.errors import BaseMismatch
from flora.identity import BaseRecord


def bind(adapter: Adapter, record: BaseRecord, name: str, architecture: str = "unknown") -> Adapter:
    """The adapter bound to the base of `record`, which is called `name`, with the hashes of the tensors it touches.

    Raises BaseMismatch if that base lacks a module of the adapter, or has it in another shape.
    """
    tensors = {tensor.name: tensor for tensor in record.tensors}
    touched = {}
    for module in adapter.header.modules:
        tensor = tensors.get(f"{module.name}.weight")
        wanted = (module.out_features, module.in_features)
        if tensor is None or tensor.shape != wanted:
            found = f"has it as {list(tensor.shape)}" if tensor else "has no such module"
            raise BaseMismatch(
                f"{module.name} is {list(wanted)} in the adapter; {name} {found}",
                cause="the adapter was made for another base",
                fix=f"give the base that it names: {adapter.header.base.name}",
                tensor=module.name,
            )
        touched[tensor.name] = tensor.sha256
    base = BaseBinding(name=name, base_id=str(record.base_id), architecture=architecture, touched=touched)
    header = msgspec.structs.replace(adapter.header, base=base)
    return Adapter(header=header, factors=adapter.factors, report=adapter.report, extras=adapter.extras)
