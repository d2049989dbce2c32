"""What a GPU's runner has compiled before its first step is all that any of its steps launches; no GPU is needed."""

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flora.bench.shapes import SHAPES
from flora.serve.config import EngineConfig
from flora.serve.engine.build import pool_geometry
from flora.serve.engine.cuda.graphs import _REACHES, decode_sizes, mixed_sizes
from flora.serve.engine.model.config import ModelConfig, parse_model_config
from flora.serve.engine.model.llama import LlamaModel
from flora.serve.engine.model.weights import expected_shapes, load_weights
from flora.serve.engine.pool import DevicePool
from flora.serve.engine.schedule.scheduler import Limits
from tests.kernels.absent_gpu import pretend_h100

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

META, DTYPE = torch.device("meta"), torch.bfloat16
CONTEXT = 2048


@pytest.fixture(autouse=True)
def h100(monkeypatch):
    pytest.importorskip("triton")
    pretend_h100(monkeypatch)
    monkeypatch.setattr(import_module("flora.kernels.linear"), "can_overlap", lambda device: True)
    runner = import_module("flora.serve.engine.cuda.runner")  # needs Triton
    monkeypatch.setattr(runner, "AdapterCopies", lambda cells: None)  # has streams of a real device


def make_runner(
    config: ModelConfig, *, batch_invariant: bool, beside_rows: int, adapter_dtype: torch.dtype | None = None
) -> Any:
    """256 sequences in steps of up to 2,048 rows; tensors without memory."""
    from flora.kernels.triton_ops import TritonOps
    from flora.serve.engine.cuda.runner import CudaRunner

    shapes = dict(expected_shapes(config))
    checkpoint = SimpleNamespace(
        path=Path("base"),
        tensors={name: SimpleNamespace(shape=shape, file="base") for name, shape in shapes.items()},
        load=lambda name: torch.empty(shapes[name], device=META),
    )
    weights = load_weights(checkpoint, config, DTYPE, META, row_invariant=batch_invariant)
    ops = TritonOps(132, overlap=True, batch_invariant=batch_invariant)
    narrow = str(adapter_dtype).removeprefix("torch.") if adapter_dtype else None
    engine = EngineConfig(
        base=Path(), registry="", cache_dir=Path(), dtype="bfloat16", adapter_dtype=narrow, pool_bytes=1 << 30
    )
    return CudaRunner(
        LlamaModel(config, weights, CONTEXT, ops),
        DevicePool(pool_geometry(config, engine, DTYPE.itemsize), DTYPE, META, adapter_dtype),
        1024,
        Limits(16, 256, 2048, 4096),
        CONTEXT,
        max_cells=64,
        batch_invariant=batch_invariant,
        beside_rows=beside_rows,
    )


def kernels_of(launch: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    from triton import knobs

    seen: set[tuple[str, str]] = set()

    def leave_out(*, key, fn, **_):
        seen.add((fn.name, key))
        return True

    with monkeypatch.context() as hooked:
        hooked.setattr(knobs.runtime, "jit_cache_hook", leave_out)
        launch()
    return seen


@pytest.mark.parametrize(
    ("shape", "changes", "switches"),
    [
        ("llama3-8b", {}, {}),
        ("llama-7b", {}, {}),
        ("llama3-8b", {}, {"beside_rows": 0}),
        ("llama3-8b", {}, {"beside_rows": 16}),
        ("llama3-8b", {}, {"beside_rows": 600}),
        ("llama3-8b", {}, {"beside_rows": 4096}),
        ("llama3-8b", {}, {"batch_invariant": True}),
        ("llama3-8b", {}, {"adapter_dtype": torch.float8_e4m3fn}),
        ("llama3-8b", {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, {}),
    ],
)
def test_no_step_launches_a_kernel_that_was_not_compiled_ahead(monkeypatch, shape, changes, switches):
    config = parse_model_config(SHAPES[shape] | {"num_hidden_layers": 2} | changes)
    runner = make_runner(config, **{"batch_invariant": False, "beside_rows": 256} | switches)

    def every_step() -> None:
        for reach in _REACHES:
            for rows in decode_sizes(256):
                runner._decode(rows, reach)
            for rows in mixed_sizes(2048):
                runner._mixed(rows, reach)

    ahead = kernels_of(runner._launch_every_kernel, monkeypatch)

    assert len(ahead) > 10
    assert any("fp8e4nv" in key for _, key in ahead) == ("adapter_dtype" in switches)
    assert kernels_of(every_step, monkeypatch) <= ahead
