"""Reading checkpoints: what is sound is read, and what is not is refused by name."""

import builtins
import io
import json
from pathlib import Path

import pytest
import torch

from flora.checkpoint import locate_checkpoint, open_checkpoint
from flora.errors import CheckpointError, NotFound, PickleRefused, RemoteError, UsageError
from tests.core.checkpoints import TENSORS, write_index, write_sharded, write_single


@pytest.mark.parametrize("write", [write_single, write_sharded])
def test_every_tensor_is_listed_and_loaded_as_it_is_stored(tmp_path, write):
    checkpoint = open_checkpoint(write(tmp_path / "model"))

    assert list(checkpoint.tensors) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        loaded = checkpoint.load(name)
        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded, tensor)
        assert checkpoint.tensors[name].numel == tensor.numel()
        assert checkpoint.tensors[name].num_bytes == tensor.numel() * tensor.element_size()
    assert checkpoint.num_bytes == 4 * 3 * 2 + 2 * 3 * 4 + 3 * 2


def test_the_bytes_of_a_tensor_lie_where_its_info_says(tmp_path):
    checkpoint = open_checkpoint(write_sharded(tmp_path / "model"))

    for name, info in checkpoint.tensors.items():
        stored = info.file.read_bytes()[info.start : info.end]
        assert stored == TENSORS[name].contiguous().view(torch.uint8).numpy().tobytes()


def test_single_files_of_any_name_are_read(tmp_path):
    folder = write_single(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")

    assert list(open_checkpoint(folder).tensors) == sorted(TENSORS)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"_name_or_path": "org/tiny"}, "org/tiny"),
        ({"_name_or_path": "/home/ann/runs/tiny"}, "folder"),
        ({"_name_or_path": "home/ann/runs/tiny"}, "folder"),
        ({"_name_or_path": "./tiny"}, "folder"),
        ({"_name_or_path": ""}, "folder"),
        ({}, "folder"),
    ],
)
def test_a_checkpoint_is_named_by_its_hub_id_and_never_by_a_path(tmp_path, config, name):
    assert open_checkpoint(write_single(tmp_path / "folder", config=config)).name == name


def test_a_snapshot_in_the_hubs_cache_is_named_by_its_hub_id(tmp_path):
    folder = write_single(tmp_path / "hub" / "models--org--tiny-llm" / "snapshots" / "0a1b2c", config={})

    assert open_checkpoint(folder).name == "org/tiny-llm"


def test_a_checkpoint_in_the_working_folder_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(write_single(tmp_path / "folder", config={}))

    assert open_checkpoint(Path()).name == "folder"


def test_small_files_beside_the_weights_can_be_had(tmp_path):
    folder = write_single(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ messages }}")

    assert open_checkpoint(folder).sidecar("chat_template.jinja") == b"{{ messages }}"
    assert open_checkpoint(folder).sidecar("generation_config.json") is None


@pytest.mark.parametrize("length", [0, 1, 8, 20, -1])
def test_a_truncated_file_is_refused_with_its_name(tmp_path, length):
    folder = write_single(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])

    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a complete safetensors file"):
        open_checkpoint(folder)


def test_a_git_lfs_pointer_is_called_what_it_is(tmp_path):
    folder = write_single(tmp_path / "model")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1000\n"
    (folder / "model.safetensors").write_bytes(pointer)

    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(folder)
    assert "Git LFS pointer" in refused.value.fix


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.pkl", "model.ckpt"])
def test_pickled_weights_are_refused_and_never_opened(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    (tmp_path / "config.json").write_text("{}")
    really_open = io.open

    def guarded(file, *args, **kwargs):
        assert Path(str(file)).name != name
        return really_open(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", guarded)
    monkeypatch.setattr(builtins, "open", guarded)

    with pytest.raises(PickleRefused, match=name):
        open_checkpoint(tmp_path)


def test_an_index_that_names_a_missing_tensor_is_refused(tmp_path):
    folder = write_sharded(tmp_path / "model")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    write_index(folder, index | {"lm_head.weight": next(iter(index.values()))})

    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        open_checkpoint(folder)


def test_a_missing_shard_is_named(tmp_path):
    folder = write_sharded(tmp_path / "model")
    (folder / "model-00002-of-00003.safetensors").unlink()

    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "index",
    [
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model.fp16.safetensors.index.json",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
    ],
)
def test_a_missing_shard_is_named_by_an_index_of_any_name(tmp_path, index):
    """A diffusers component without one of its shards was read as a smaller model."""
    folder = write_sharded(tmp_path / "transformer")
    (folder / "model.safetensors.index.json").rename(folder / index)
    assert list(open_checkpoint(folder).tensors) == sorted(TENSORS)

    (folder / "model-00002-of-00003.safetensors").unlink()

    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        open_checkpoint(folder)


def test_two_indices_that_do_not_agree_are_refused_and_two_that_do_are_one(tmp_path):
    folder = write_sharded(tmp_path / "transformer")
    text = (folder / "model.safetensors.index.json").read_text()
    (folder / "model.safetensors.index.json").unlink()
    for name in ("a.safetensors.index.json", "a.fp16.safetensors.index.json"):
        (folder / name).write_text(text)
    assert list(open_checkpoint(folder).tensors) == sorted(TENSORS)

    (folder / "a.fp16.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))

    with pytest.raises(CheckpointError, match=r"do not agree: a\.fp16.*, a\.safetensors") as caught:
        open_checkpoint(folder)
    assert "give a folder with one of them" in caught.value.fix


def test_the_index_that_transformers_reads_comes_before_any_other(tmp_path):
    folder = write_sharded(tmp_path / "model")
    (folder / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "consolidated-1"}}))

    assert list(open_checkpoint(folder).tensors) == sorted(TENSORS)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "..", "sub/model.safetensors", "x\0y"])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, file):
    folder = write_sharded(tmp_path / "model")
    write_single(tmp_path)
    write_index(folder, {"model.norm.weight": file})

    with pytest.raises(CheckpointError):
        open_checkpoint(folder)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {"a": None}])
def test_an_index_without_a_weight_map_is_refused(tmp_path, weight_map):
    folder = write_sharded(tmp_path / "model")
    write_index(folder, weight_map)

    with pytest.raises(CheckpointError, match="weight_map"):
        open_checkpoint(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    folder = write_single(tmp_path / "model")
    (folder / "copy.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").rename(folder / "original.safetensors")

    with pytest.raises(CheckpointError, match="stands in both"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\x00"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path, text):
    folder = write_single(tmp_path / "model")
    (folder / "config.json").write_text(text)

    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(folder)


def test_an_adapter_given_as_a_checkpoint_is_called_what_it_is(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")

    with pytest.raises(CheckpointError, match="is an adapter"):
        open_checkpoint(tmp_path)


def test_an_empty_folder_and_no_folder_are_told_apart(tmp_path):
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        open_checkpoint(tmp_path)
    with pytest.raises(NotFound):
        open_checkpoint(tmp_path / "nowhere")


def test_a_folder_is_its_own_location(tmp_path):
    assert locate_checkpoint(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere", "~/nowhere-at-all", "a/b/c"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(source):
    with pytest.raises(NotFound):
        locate_checkpoint(source)


def test_a_hub_id_offline_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    with pytest.raises(RemoteError, match="cannot be reached"):
        locate_checkpoint("org/never-downloaded")


def test_what_is_neither_a_folder_nor_a_hub_id_is_a_usage_error():
    with pytest.raises(UsageError):
        locate_checkpoint("not an id!")
