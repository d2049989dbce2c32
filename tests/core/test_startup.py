"""What waits until it is asked for, in processes that import torch as `flora extract` does."""

import subprocess
import sys

import torch
from safetensors.torch import load_file

from tests.extract.models import build, save, tune

PRELUDE = """
import sys
from flora.startup import complete_torch, import_torch
import_torch()
import torch
"""


def output_of(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_functions_for_tensors_without_numbers_are_imported_when_they_are_asked_for():
    code = """
print("torch._prims" in sys.modules)
complete_torch()
print("torch._prims" in sys.modules)
with torch.device("meta"):
    print(torch.zeros(3, 3)[torch.zeros(2, dtype=torch.int64)].shape[0])
"""

    assert output_of(code).split() == ["False", "True", "2"]


def test_whoever_asks_for_a_name_of_theirs_gets_it():
    assert output_of("from torch._meta_registrations import meta_index_Tensor as f; print(f.__name__)") == (
        "meta_index_Tensor"
    )


def test_torch_that_is_there_already_is_left_alone():
    from flora.startup import complete_torch, import_torch

    import_torch()
    complete_torch()

    assert torch.zeros(3, 3, device="meta")[torch.zeros(2, dtype=torch.int64, device="meta")].shape == (2, 3)


def test_extraction_gives_the_same_bytes_with_and_without_them(tmp_path):
    base = build()
    save(base, tmp_path / "base")
    save(tune(base), tmp_path / "tuned")
    words = ["extract", str(tmp_path / "base"), str(tmp_path / "tuned"), "--rank", "4"]
    environment = {"FLORA_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": ""}

    for out, setup in (("with", "import torch; "), ("without", "")):
        code = (
            f"import sys; {setup}from flora.__main__ import run; sys.argv = ['flora'] + sys.argv[1:]; sys.exit(run())"
        )
        command = [sys.executable, "-c", code, *words, "--out", str(tmp_path / out)]
        subprocess.run(command, check=True, capture_output=True, env=environment)

    one, other = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("with", "without"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
