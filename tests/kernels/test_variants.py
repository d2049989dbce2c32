"""A server's first start waits for Triton, which compiles a kernel in a second or two, one after another."""

import os

import pytest
import torch

from flora.kernels import FEW_ROWS, AdapterWeights, Group, Place, WorkList
from flora.kernels.tuning import SHORT_LIST, Tuning

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

META = torch.device("meta")
LAYERS, WIDTH, RANK = 32, 4096, 512


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


def project(layer: int, capacity: int) -> None:
    """Shrink and expand of one layer's o projection, for a decode step's list that has room for `capacity` rows."""
    from flora.kernels.triton_ops import TritonOps

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.int32, device=META)

    pool = torch.empty(64, 32768, dtype=torch.bfloat16, device=META)
    weights = AdapterWeights(pool, ints(8, 64), ints(8, LAYERS, 7, 3), torch.empty(8, LAYERS, 7, device=META), 1024)
    work = WorkList.build([], block_rows=FEW_ROWS, max_rank=RANK, capacity=capacity, device=META)
    place = Place(layer, Group.OUT, (0,), (WIDTH,))
    x = torch.empty(capacity, WIDTH, dtype=torch.bfloat16, device=META)
    ops = TritonOps(132, Tuning(), overlap=True)
    ops.lora_expand(torch.empty_like(x), ops.lora_shrink(x, weights, place, work), weights, place, work)


@pytest.mark.parametrize(
    "capacities",
    [range(1, SHORT_LIST + 1), (4, 8, 16, 48, 176, 200, 256)],
    ids=["one stream", "many"],
)
def test_one_kernel_serves_every_layer_and_every_length_of_list(compiled, capacities):
    for layer in range(LAYERS):
        for capacity in capacities:
            project(layer, capacity)

    assert {name: len(variants) for name, variants in compiled.items()} == {
        "_lora_shrink_kernel": 1,
        "_lora_expand_kernel": 1,
    }
