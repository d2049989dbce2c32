"""An import's base, claimed and proven."""

import pytest
import torch

from flora.adapter import BaseBinding, make_adapter
from flora.errors import BaseMismatch
from flora.identity import BaseRecord, TensorRecord
from flora.registry.binding import bind
from tests.registry.adapters import Q_PROJ, SHAPES, random_adapter

CLAIMED = BaseBinding(name="org/claimed", base_id=None)
RECORD = BaseRecord(
    tuple(
        TensorRecord(f"{name}.weight", "BF16", shape, f"{index:064x}")
        for index, (name, shape) in enumerate(SHAPES.items())
    )
)


def test_a_proven_base_is_known_by_its_record(registry):
    adapter = random_adapter(base=CLAIMED)

    bound = bind(adapter, RECORD, "org/proven", "LlamaForCausalLM")

    assert bound.header.base.base_id == str(RECORD.base_id)
    assert bound.header.base.name == "org/proven"
    assert bound.header.base.touched == {
        f"{m.name}.weight": RECORD.hashes()[f"{m.name}.weight"] for m in adapter.header.modules
    }
    assert bound.header.serving_digest != adapter.header.serving_digest
    assert bound.header.modules == adapter.header.modules
    assert registry.load(registry.add(bound, "sql")).header == bound.header


@pytest.mark.parametrize("shape", [None, (32, 31), (31, 32), (32,)])
def test_a_base_without_that_module_or_of_another_size_is_refused(shape):
    others = tuple(tensor for tensor in RECORD.tensors if tensor.name != f"{Q_PROJ}.weight")
    record = BaseRecord((*others, TensorRecord(f"{Q_PROJ}.weight", "BF16", shape, "0" * 64)) if shape else others)

    with pytest.raises(BaseMismatch, match="q_proj") as refused:
        bind(random_adapter(base=CLAIMED), record, "org/other")
    assert refused.value.tensor == Q_PROJ


def test_an_adapter_with_whole_tensors_is_bound_with_them():
    adapter = make_adapter(
        random_adapter(base=CLAIMED).factors,
        CLAIMED,
        random_adapter().header.recipe,
        exact={"model.norm.weight": torch.ones(4)},
    )
    record = BaseRecord((*RECORD.tensors, TensorRecord("model.norm.weight", "BF16", (4,), "e" * 64)))

    bound = bind(adapter, record, "org/proven")

    assert bound.exact.keys() == {"model.norm.weight"}
    assert bound.header.base.touched["model.norm.weight"] == "e" * 64
