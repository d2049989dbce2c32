"""An adapter is served on the weights that it was made for, whatever they are called."""

import logging

import pytest

from flora.adapter import BaseBinding
from flora.errors import BaseMismatch
from flora.identity import BaseRecord, TensorRecord
from flora.serve.engine.loading.binding import check_base

SERVED = BaseRecord((TensorRecord("a", "F32", (2,), "11"), TensorRecord("b", "F32", (2,), "22")))
OTHER_ID = "sha256:" + "0" * 64


def binding(base_id: str | None, **touched: str) -> BaseBinding:
    return BaseBinding(name="whatever", base_id=base_id, touched=touched)


def test_the_same_base_id_is_enough():
    check_base(binding(str(SERVED.base_id), a="other"), SERVED, "x")


def test_another_base_with_the_same_touched_tensors_will_do():
    """Two checkpoints that differ in a tensor that the adapter does not change: a new tokenizer's rows, say."""
    check_base(binding(OTHER_ID, a="11"), SERVED, "x")


def test_a_touched_tensor_that_differs_is_a_mismatch():
    with pytest.raises(BaseMismatch) as caught:
        check_base(binding(OTHER_ID, a="11", b="33"), SERVED, "x")

    assert "1 of the 2 tensors that it changes differ, b among them" in caught.value.cause


def test_a_touched_tensor_that_is_not_there_is_a_mismatch():
    with pytest.raises(BaseMismatch):
        check_base(binding(OTHER_ID, c="11"), SERVED, "x")


def test_another_base_and_no_tensors_to_compare_is_a_mismatch():
    with pytest.raises(BaseMismatch):
        check_base(binding(OTHER_ID), SERVED, "x")


def test_an_import_that_claims_a_base_is_let_through_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        check_base(binding(None), SERVED, "x")

    assert "adapter base unproven label=x claimed_base=whatever" in caplog.text
