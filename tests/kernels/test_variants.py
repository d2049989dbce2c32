"""A server's first start waits for Triton, which compiles a kernel in a second or two, one after another."""

import os

import pytest
import torch

from flora.kernels.tuning import MIDDLE_LIST, SHORT_LIST
from tests.kernels.absent_gpu import launch_lora

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


@pytest.fixture
def compiled(monkeypatch):
    """Kernel -> what Triton would compile of it, by its documented rule: an integer that is 1, or a multiple of 16, or
    neither makes another kernel, unless its argument is declared not to.
    """
    jit = pytest.importorskip("triton.runtime.jit")
    variants: dict[str, set[tuple[object, ...]]] = {}

    def kind(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.dtype
        if isinstance(value, int) and not isinstance(value, bool):
            return "1" if value == 1 else "16" if value % 16 == 0 else "integer"
        return type(value)

    def run(self, *args, grid, warmup, **options):
        values = dict(zip(self.arg_names, args, strict=False)) | options
        key = tuple(
            values[p.name] if p.is_constexpr else "any" if p.do_not_specialize else kind(values[p.name])
            for p in self.params
        )
        variants.setdefault(self.fn.__name__, set()).add(key)

    monkeypatch.setattr(jit.JITFunction, "run", run)
    return variants


@pytest.mark.parametrize(
    "capacities",
    [range(1, SHORT_LIST + 1), (SHORT_LIST + 1, 32, 48, MIDDLE_LIST), (MIDDLE_LIST + 1, 176, 200, 256)],
    ids=["few", "some", "many"],
)
def test_one_kernel_serves_every_layer_and_every_length_of_list(compiled, capacities):
    for layer in range(32):
        for capacity in capacities:
            launch_lora(layer, capacity)

    assert {name: len(variants) for name, variants in compiled.items()} == {
        "_lora_shrink_kernel": 1,
        "_lora_expand_kernel": 1,
    }
