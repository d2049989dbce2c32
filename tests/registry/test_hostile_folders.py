"""Folders with any byte changed: an adapter comes out, or an error of ours; nothing else, and nothing large."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flora.errors import AdapterInvalid, FloraError
from flora.registry.formats.peft import load_peft, save_peft
from tests.registry.adapters import random_adapter

FILES = ["adapter_config.json", "adapter_model.safetensors", "flora.json"]
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "sound"
    save_peft(random_adapter(), path)
    return path


def load_with(folder: Path, **changed: bytes) -> None:
    """Loads a copy of the folder in which some files have other bytes, or for b"" are missing."""
    copy = folder.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    for name, data in changed.items():
        (copy / name).write_bytes(data) if data else (copy / name).unlink()
    with contextlib.suppress(FloraError):
        adapter = load_peft(copy)
        assert adapter.header.modules
        assert all(bool(factors.A.isfinite().all()) for factors in adapter.factors.values())
    shutil.rmtree(copy)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.sampled_from(FILES),
    st.booleans(),
    st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=9)), min_size=1, max_size=4),
)
def test_any_bytes_may_change_in_any_file(folder, name, is_import, edits):
    data = (folder / name).read_bytes()
    for place, replacement in edits:
        at = int(place * len(data))
        data = data[:at] + replacement + data[at + len(replacement) :]
    changed = {"flora.json": b""} if is_import and name != "flora.json" else {}

    load_with(folder, **changed, **{name: data or b"\0"})


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.sampled_from([FILES[0], FILES[2]]), st.data())
def test_any_value_may_stand_for_any_other(folder, name, data):
    document = json.loads((folder / name).read_bytes())
    at = document
    while True:
        key = data.draw(st.sampled_from(sorted(at)) if isinstance(at, dict) else st.integers(0, len(at) - 1))
        if not at[key] or not isinstance(at[key], (dict, list)) or data.draw(st.booleans()):
            break
        at = at[key]
    at[key] = data.draw(values)

    load_with(folder, **{name: json.dumps(document).encode()})


def test_an_integer_that_no_double_holds_is_refused_like_any_other_wrong_value(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    document = json.loads((folder / "flora.json").read_bytes())
    document["header"]["schema_version"] = 2**53
    (tmp_path / "copy" / "flora.json").write_bytes(json.dumps(document).encode())

    with pytest.raises(AdapterInvalid, match="JSON"):
        load_peft(tmp_path / "copy")


def test_what_is_loaded_does_not_change_with_the_file(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    adapter = load_peft(tmp_path / "copy")
    before = {name: factors.A.clone() for name, factors in adapter.factors.items()}

    weights = tmp_path / "copy" / FILES[1]
    with weights.open("r+b") as file:
        file.seek(-64, 2)
        file.write(b"\xff" * 64)

    assert all(torch.equal(adapter.factors[name].A, A) for name, A in before.items())
