"""`flora extract` as a process of its own, which imports torch without what it does not need: the same adapters."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from flora.cli import main
from tests.extract import moe, test_diffusion, test_mxfp4
from tests.extract.models import build, save, tune
from tests.extract.test_stored_forms import quantize, write_gguf
from tests.extract.zoo import ZOO

EVERYTHING = ("--embeddings", "--vectors", "--routers")
CODE = """
import sys
from flora.__main__ import run
code = run()
with open(sys.argv[sys.argv.index("--out") + 1] + ".state", "w") as file:
    file.write(type(sys.modules["torch._meta_registrations"]).__name__)
sys.exit(code)
"""
Made = Callable[[Path], tuple[Path, Path]]


def plain(make: Callable[[], nn.Module]) -> Made:
    def made(folder: Path) -> tuple[Path, Path]:
        torch.manual_seed(0)
        model = make()
        return save(model, folder / "base", torch.bfloat16).path, save(tune(model), folder / "tuned").path

    return made


def eight_bits(folder: Path) -> tuple[Path, Path]:
    return quantize(save(build(), folder / "base")).path, save(tune(build()), folder / "tuned").path


def four_bits(folder: Path) -> tuple[Path, Path]:
    model = test_mxfp4.model()
    base = test_mxfp4.quantize(save(model, folder / "base", torch.bfloat16))
    return base.path, save(tune(model), folder / "tuned", torch.bfloat16).path


def gguf(folder: Path) -> tuple[Path, Path]:
    return write_gguf(build(), folder / "base.gguf"), save(tune(build()), folder / "tuned").path


def pickled(folder: Path) -> tuple[Path, Path]:
    base, tuned = save(build(), folder / "base").path, save(tune(build()), folder / "tuned").path
    torch.save(load_file(tuned / "model.safetensors"), tuned / "pytorch_model.bin")
    (tuned / "model.safetensors").unlink()
    return base, tuned


def of_zoo(name: str) -> Made:
    return plain(ZOO[name].make)


CASES: dict[str, tuple[Made, tuple[str, ...]]] = {
    "rank": (plain(build), ("--rank", "8")),
    "energy": (plain(build), ("--energy", "0.9")),
    "budget": (plain(build), ("--budget", "40KB")),
    "eight-bit-factors": (plain(build), (*EVERYTHING, "--dtype", "float8")),
    "exactly": (plain(build), ("--rank", "8", "--exact")),
    "conv1d-of-gpt2": (of_zoo("gpt2"), EVERYTHING),
    "encoder-decoder": (of_zoo("whisper"), EVERYTHING),
    "two-towers": (of_zoo("clip"), EVERYTHING),
    "experts": (plain(moe.qwen3), EVERYTHING),
    "image-model": (plain(test_diffusion.unet), EVERYTHING),
    "fp8-base": (eight_bits, ()),
    "mxfp4-base": (four_bits, ()),
    "gguf-base": (gguf, ()),
    "pickled": (pickled, ("--allow-pickle",)),
}

# Here the tree of modules is built without numbers, or transformers is imported: the rest of torch comes with it.
COMPLETED = {"conv1d-of-gpt2", "encoder-decoder", "two-towers", "image-model", "gguf-base"}


USUAL = ("rank", "eight-bit-factors", "conv1d-of-gpt2", "experts", "fp8-base", "mxfp4-base")


@pytest.mark.parametrize("name", [n if n in USUAL else pytest.param(n, marks=pytest.mark.long) for n in CASES])
def test_the_command_gives_what_the_same_words_give_where_all_of_torch_is(name, tmp_path, monkeypatch):
    make, words = CASES[name]
    base, tuned = make(tmp_path)
    monkeypatch.setenv("FLORA_HOME", str(tmp_path / "home"))
    command = ["extract", str(base), str(tuned), *words, "--out"]

    done = subprocess.run(
        [sys.executable, "-c", CODE, *command, str(tmp_path / "process")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    is_whole = (tmp_path / "process.state").read_text() != "_Postponed"
    assert is_whole == (name in COMPLETED), "what is postponed is not what this test was written for"
    assert main([*command, str(tmp_path / "here")]) == 0

    one, other = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("process", "here"))
    assert one
    assert one.keys() == other.keys()
    assert all(torch.equal(one[each].view(torch.uint8), other[each].view(torch.uint8)) for each in one)
