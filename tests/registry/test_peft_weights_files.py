"""What may lie under the name of a PEFT folder's weights: pickles, archives, and safetensors that are none."""

import pytest
import torch

from flora.errors import AdapterInvalid, PickleRefused
from flora.registry.formats.peft import load_peft
from tests.registry.peft_folders import A_KEY, WEIGHTS, as_foreign


def test_a_pickle_is_refused_and_never_opened(tmp_path, monkeypatch):
    foreign = as_foreign(tmp_path / "theirs")
    (foreign / WEIGHTS).rename(foreign / "adapter_model.bin")
    torch.save({A_KEY: torch.zeros(1)}, foreign / "adapter_model.bin")
    forbid_opening(monkeypatch, "adapter_model.bin")

    with pytest.raises(PickleRefused):
        load_peft(foreign)


def test_a_pickle_beside_safetensors_is_refused_too(tmp_path):
    foreign = as_foreign(tmp_path / "theirs")
    (foreign / "adapter_model.pt").write_bytes(b"x")

    with pytest.raises(PickleRefused):
        load_peft(foreign)


def test_a_trainers_other_pickles_do_not_matter(tmp_path, monkeypatch):
    foreign = as_foreign(tmp_path / "theirs")
    (foreign / "training_args.bin").write_bytes(b"x")
    forbid_opening(monkeypatch, "training_args.bin")

    load_peft(foreign)


@pytest.mark.parametrize("protocol", [2, 5], ids=["pickle 2", "pickle 5"])
def test_pickle_bytes_under_a_safetensors_name_are_refused(tmp_path, protocol):
    import pickle

    foreign = as_foreign(tmp_path / "theirs")
    (foreign / WEIGHTS).write_bytes(pickle.dumps({"a": 1}, protocol=protocol))

    with pytest.raises(PickleRefused):
        load_peft(foreign)


def test_a_torch_archive_under_a_safetensors_name_is_refused(tmp_path):
    foreign = as_foreign(tmp_path / "theirs")
    torch.save({A_KEY: torch.zeros(1)}, foreign / WEIGHTS)

    with pytest.raises(PickleRefused):
        load_peft(foreign)


def forbid_opening(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Makes any opening of a file of that name, from Python, fail the test."""
    import io

    really_open = io.open

    def guarded(file, *args, **kwargs):
        assert not str(file).endswith(name), f"{name} was opened"
        return really_open(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", guarded)
    monkeypatch.setattr("builtins.open", guarded)


def container(header: bytes, body: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x10",
        (1 << 62).to_bytes(8, "little"),
        (100 << 20).to_bytes(8, "little") + b"{}",
        container(b"{"),
        container(b"[]"),
        container(b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}', b"x" * 16),
        container(b'{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,1000000000000]}}', b"x" * 16),
        container(b'{"a":{"dtype":"F32","shape":[-1,2],"data_offsets":[0,16]}}', b"x" * 16),
        container(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', b"x" * 17),
        container(
            b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
            b'"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
            b"x" * 16,
        ),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
    ids=["empty", "one byte", "length lies", "header over file", "cut json", "list", "overflow", "past the end",
         "negative", "trailing bytes", "name twice", "LFS pointer"],
)  # fmt: skip
def test_a_file_that_is_no_sound_safetensors_is_refused(tmp_path, data):
    foreign = as_foreign(tmp_path / "theirs")
    (foreign / WEIGHTS).write_bytes(data)

    with pytest.raises(AdapterInvalid):
        load_peft(foreign)


def test_a_sparse_terabyte_is_refused_without_reading_it(tmp_path):
    foreign = as_foreign(tmp_path / "theirs")
    with (foreign / WEIGHTS).open("r+b") as file:
        file.truncate(1 << 40)

    with pytest.raises(AdapterInvalid):
        load_peft(foreign)
