"""An adapter is served on the weights that it was made for, whatever they are called; on others by permission alone."""

import logging
from pathlib import Path

import pytest

from flora.adapter import BaseBinding
from flora.errors import BaseMismatch, StoreError
from flora.identity import BaseRecord, TensorRecord
from flora.registry import Registry
from flora.serve.engine.loading.binding import admit, check_base
from tests.registry.adapters import random_adapter

SERVED = BaseRecord((TensorRecord("a", "F32", (2,), "11" * 32), TensorRecord("b", "F32", (2,), "22" * 32)))
OTHER_ID = "sha256:" + "0" * 64


def binding(base_id: str | None, **touched: str) -> BaseBinding:
    return BaseBinding(name="whatever", base_id=base_id, touched=touched)


def test_the_same_base_id_is_enough():
    check_base(binding(str(SERVED.base_id), a="other"), SERVED, "x")


def test_another_base_with_the_same_touched_tensors_will_do():
    """Two checkpoints that differ in a tensor that the adapter does not change: a new tokenizer's rows, say."""
    check_base(binding(OTHER_ID, a="11" * 32), SERVED, "x")


def test_a_touched_tensor_that_differs_is_a_mismatch():
    with pytest.raises(BaseMismatch) as caught:
        check_base(binding(OTHER_ID, a="11" * 32, b="33" * 32), SERVED, "x")

    assert "1 of the 2 tensors that it changes differ, b among them" in caught.value.cause


def test_a_touched_tensor_that_is_not_there_is_a_mismatch():
    with pytest.raises(BaseMismatch):
        check_base(binding(OTHER_ID, c="11" * 32), SERVED, "x")


def test_another_base_and_no_tensors_to_compare_is_a_mismatch():
    with pytest.raises(BaseMismatch):
        check_base(binding(OTHER_ID), SERVED, "x")


def test_an_import_that_claims_a_base_is_let_through_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        check_base(binding(None), SERVED, "x")

    assert "adapter base unproven label=x claimed_base=whatever" in caplog.text


@pytest.fixture
def stranger(tmp_path: Path):
    """A registry with one adapter, of another base than SERVED."""
    with Registry.open(tmp_path) as registry:
        yield registry, registry.add(random_adapter(base=binding(OTHER_ID, a="33" * 32)), "sql")


def test_without_permission_a_mismatch_is_refused_and_nothing_is_recorded(stranger):
    registry, version = stranger

    with pytest.raises(BaseMismatch):
        admit(registry, version, registry.header(version), SERVED, "sql", allow_mismatch=False)

    assert registry.mismatches(version) == []


def test_a_mismatch_that_is_allowed_stands_in_the_registry_and_in_the_log(stranger, caplog):
    registry, version = stranger

    with caplog.at_level(logging.WARNING):
        admit(registry, version, registry.header(version), SERVED, "sql", allow_mismatch=True)

    assert [noted.base_id for noted in registry.mismatches(version)] == [str(SERVED.base_id)]
    assert f"adapter on another base label=sql ref=sql@v1 base={OTHER_ID} served={SERVED.base_id}" in caplog.text


def test_permission_leaves_no_record_of_an_adapter_that_fits(tmp_path):
    with Registry.open(tmp_path) as registry:
        version = registry.add(random_adapter(base=binding(OTHER_ID, a="11" * 32)), "cousin")

        admit(registry, version, registry.header(version), SERVED, "cousin", allow_mismatch=True)

        assert registry.mismatches(version) == []


def test_a_mismatch_that_cannot_be_recorded_is_not_served(stranger, monkeypatch):
    """As it is with a registry that is only to be read."""
    registry, version = stranger
    monkeypatch.setattr("flora.registry.database.BUSY_TIMEOUT_MS", 50)
    with Registry.open(registry.root) as impatient, registry._home.writing():
        with pytest.raises(StoreError):
            admit(impatient, version, impatient.header(version), SERVED, "sql", allow_mismatch=True)

        assert impatient.mismatches(version) == []
