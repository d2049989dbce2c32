"""What `flora extract` says of a change that low rank does not fit, and how it ends."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

MODULES = ("proj.weight",)


def changed(base, folder, change):
    """A copy of `base` with `change(weight, generator)` added to every linear layer."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(MODULES):
            tensors[name] = (tensor.float() + change(tensor, generator)).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def white(weight, generator):
    return 0.01 * torch.randn(weight.shape, generator=generator)


def sparse(weight, generator):
    return white(weight, generator) * (torch.rand(weight.shape, generator=generator) < 0.1)


def test_a_change_of_low_rank_is_called_that(flora, base, tuned):
    done = flora("extract", base, tuned, "--rank", 8)

    assert "verdict: low rank fits" in done.err


@pytest.mark.parametrize(("change", "verdict"), [(white, "near full rank"), (sparse, "sparse")])
def test_where_low_rank_is_the_wrong_tool_the_verdict_says_so(flora, base, tmp_path, change, verdict):
    tuned = changed(base, tmp_path / "tuned", change)

    done = flora("extract", base, tuned, "--rank", 4)

    assert f"verdict: {verdict}" in done.err
    assert "low rank is the wrong tool" in done.err
    assert flora("ls", "-q").out.split() == ["tuned"]


@pytest.mark.parametrize(("change", "verdict"), [(white, "near full rank"), (sparse, "sparse")])
def test_strict_makes_such_a_verdict_a_failed_check(flora, base, tmp_path, change, verdict):
    tuned = changed(base, tmp_path / "tuned", change)

    done = flora("extract", base, tuned, "--rank", 4, "--strict", code=3)

    assert "error[FL-CHECK]" in done.err
    assert verdict in done.err
    assert flora("ls", "-q").out == ""


def test_an_unchanged_checkpoint_makes_no_adapter_and_does_not_stop_the_others(flora, base, tuned, tmp_path):
    copy = shutil.copytree(base, tmp_path / "copy")

    done = flora("extract", base, copy, tuned, "--rank", 2, "--json")

    assert [row["verdict"] for row in done.json["unchanged"]] == ["unchanged"]
    assert [row["ref"] for row in done.json["adapters"]] == ["tiny-tuned@v1"]
    assert "verdict: unchanged" in done.err


def test_strict_makes_an_unchanged_checkpoint_a_failed_check(flora, base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "copy")

    assert "error[FL-CHECK]" in flora("extract", base, copy, "--strict", code=3).err


def test_the_report_counts_changed_weights_and_directions_that_stand_out(flora, base, tuned):
    tensors = flora("extract", base, tuned, "--rank", 16, "--json").json["adapters"][0]["tensors"]

    up = next(tensor for tensor in tensors if tensor["name"] == "model.layers.0.mlp.up_proj.weight")
    assert up["changed_share"] > 0.9
    assert up["signal_rank"] == 4
    assert up["signal_energy"] > 0.95 * up["norm_squared"]


def test_rounding_of_the_weights_is_named_where_it_is_much_of_the_change(flora, base, tmp_path):
    tuned = changed(base, tmp_path / "tuned", lambda weight, generator: 0.01 * white(weight, generator))

    assert "is rounding of the tuned weights" in flora("extract", base, tuned, "--rank", 4).err


def test_an_energy_above_what_storage_noise_leaves_says_so(flora, base, tmp_path):
    tuned = changed(base, tmp_path / "tuned", lambda weight, generator: 0.01 * white(weight, generator))

    adapter = flora("extract", base, tuned, "--energy", 0.99, "--rank", 16, "--json").json["adapters"][0]

    missed = [row for row in adapter["tensors"] if row["status"] == "extracted"]
    assert all("; storage noise alone is " in row["reason"] for row in missed)
    assert adapter["noise_share"] == pytest.approx(
        sum(row["noise"] for row in missed) / sum(row["norm_squared"] for row in missed)
    )
