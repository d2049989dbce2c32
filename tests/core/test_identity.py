"""Base ids: by content, with a cache that notices what changed."""

import json
import os

import pytest
import torch

from flora import identity
from flora.checkpoint import open_checkpoint
from flora.digests import digest_bytes
from flora.identity import base_record, records_beside
from tests.core.checkpoints import TENSORS, write_sharded, write_single


def test_a_record_holds_the_hash_of_every_tensors_bytes(tmp_path):
    record = base_record(open_checkpoint(write_sharded(tmp_path / "model")))

    assert [tensor.name for tensor in record.tensors] == sorted(TENSORS)
    for tensor in record.tensors:
        raw = TENSORS[tensor.name].contiguous().view(torch.uint8).numpy().tobytes()
        assert tensor.sha256 == digest_bytes(raw).hex
        assert tensor.shape == tuple(TENSORS[tensor.name].shape)


def test_the_base_id_does_not_see_how_the_weights_are_sharded(tmp_path):
    single = base_record(open_checkpoint(write_single(tmp_path / "single")))
    sharded = base_record(open_checkpoint(write_sharded(tmp_path / "sharded")))

    assert single.base_id == sharded.base_id


def test_one_bit_makes_another_base(tmp_path):
    folder = write_single(tmp_path / "model")
    before = base_record(open_checkpoint(folder)).base_id
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)

    assert base_record(open_checkpoint(folder)).base_id != before


def test_a_name_dtype_or_shape_makes_another_base(tmp_path):
    def base_id(name: str, tensor: torch.Tensor) -> str:
        return str(base_record(open_checkpoint(write_single(tmp_path / "model", {name: tensor}))).base_id)

    zeros = torch.zeros(2, 2, dtype=torch.bfloat16)
    ids = {base_id("a", zeros), base_id("b", zeros), base_id("a", zeros.half()), base_id("a", zeros.reshape(4))}

    assert len(ids) == 4


def test_a_second_reading_takes_the_hashes_from_the_cache(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(write_sharded(tmp_path / "model"))
    first = base_record(checkpoint, tmp_path / "cache")
    monkeypatch.setattr(identity, "_hash_tensors", lambda *_: pytest.fail("read again"))

    assert base_record(checkpoint, tmp_path / "cache") == first


def test_a_file_that_changed_is_hashed_again(tmp_path):
    folder = write_single(tmp_path / "model")
    before = base_record(open_checkpoint(folder), tmp_path / "cache")
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(1, 1))  # the clock's step may hide a quick change; a time that differs does not

    assert base_record(open_checkpoint(folder), tmp_path / "cache") != before


@pytest.mark.parametrize("text", ["", "[]", "{", '{"key": 1}', '{"key": {}, "sha256": {}}'])
def test_a_damaged_cache_costs_only_time(tmp_path, text):
    checkpoint = open_checkpoint(write_single(tmp_path / "model"))
    expected = base_record(checkpoint, tmp_path / "cache")
    for file in (tmp_path / "cache").iterdir():
        file.write_text(text)

    assert base_record(checkpoint, tmp_path / "cache") == expected


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path):
    checkpoint = open_checkpoint(write_single(tmp_path / "model"))
    (tmp_path / "cache").write_text("a file where the folder should be")

    assert base_record(checkpoint, tmp_path / "cache") == base_record(checkpoint)


def test_the_cache_holds_no_half_written_files(tmp_path):
    base_record(open_checkpoint(write_single(tmp_path / "model")), tmp_path / "cache")

    for file in (tmp_path / "cache").iterdir():
        assert json.loads(file.read_text())["sha256"]


def test_hashing_ends_before_the_next_tensor_where_the_check_says_so(tmp_path):
    checkpoint = open_checkpoint(write_sharded(tmp_path / "model"))
    calls: list[int] = []

    def check() -> None:
        calls.append(len(calls))
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        base_record(checkpoint, check=check)
    assert len(calls) == 2


def test_records_that_are_made_beside_other_work_are_those_made_alone(tmp_path):
    checkpoint = open_checkpoint(write_sharded(tmp_path / "model"))

    with records_beside([checkpoint, checkpoint], None) as records:
        assert records() == [base_record(checkpoint)] * 2
