import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILES = sorted(path.name for path in (Path(__file__).parent / "on_triton").glob("test_*.py"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are tested on the GPU itself")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets them already")
@pytest.mark.parametrize("name", FILES)
def test_the_kernels_agree_with_their_formulas_in_tritons_interpreter(name):
    pytest.importorskip("triton")
    path = Path(__file__).parent / "on_triton" / name
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(path)]

    result = subprocess.run(command, env=environment, cwd=path.parents[3], capture_output=True, text=True, timeout=280)

    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
