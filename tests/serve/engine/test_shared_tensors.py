"""An adapter whose weights lie in parts is served as one whose weights are a file: the same cells, the same checks."""

import re

import pytest
import torch
from torch import Tensor

from flora.adapter import Adapter, make_adapter
from flora.errors import StoreError
from flora.lowrank import LowRank
from flora.registry import cutting
from flora.serve.config import EngineConfig
from flora.serve.engine.build import adapter_source
from flora.serve.engine.loading.source import RegistrySource
from flora.serve.request import AdapterTarget
from tests.serve.engine.adapters import random_adapter
from tests.serve.engine.worlds import World, ask, run_to_end


@pytest.fixture
def share_small_tensors(monkeypatch):
    monkeypatch.setattr(cutting, "MIN_SHARED_BYTES", 64)


def rescaled(adapter: Adapter) -> Adapter:
    """The same A, and twice the B."""
    factors = {module.name: LowRank(A=factors.A, B=factors.B * 2, scale=factors.scale) for module, factors in adapter}
    return make_adapter(factors, adapter.header.base, adapter.header.recipe)


def pack(source: RegistrySource, target: AdapterTarget) -> Tensor:
    found = source.find(target)
    cells = torch.zeros(found.num_cells, source.geometry.cell_elements)
    source.pack(found, cells)
    return cells


def test_cells_and_answers_are_the_same_before_and_after_a_sibling_came(world: World, share_small_tensors):
    config = EngineConfig(base=world.base, registry=str(world.home / "registry"), cache_dir=world.home / "cache")
    adapter = random_adapter(world.config, seed=1, ranks=[2, 3])
    target = world.add(adapter, "sql")
    source = adapter_source(config)
    before = pack(source, target)
    engine = world.engine(host_cache_bytes=0)
    ask(engine, "whole", [1, 2, 3], target)
    (first,) = run_to_end(engine).values()
    engine.close()

    sibling = world.add(rescaled(adapter), "sibling")

    assert len(list((world.home / "registry" / "blobs").rglob("*.parts"))) == 2
    for loader in (source, adapter_source(config)):  # one that had read the file, and one that never saw it
        assert torch.equal(pack(loader, target), before)
        assert not torch.equal(pack(loader, sibling), before)
    engine = world.engine(host_cache_bytes=0)
    ask(engine, "parts", [1, 2, 3], target)
    (second,) = run_to_end(engine).values()
    engine.close()
    assert second.tokens == first.tokens


def test_a_damaged_part_fails_every_adapter_that_has_it_and_no_other(world: World, share_small_tensors):
    config = EngineConfig(base=world.base, registry=str(world.home / "registry"), cache_dir=world.home / "cache")
    adapter = random_adapter(world.config, seed=1, ranks=[2])
    targets = [world.add(each, f"name-{number}") for number, each in enumerate([adapter, rescaled(adapter)])]
    apart = world.add(random_adapter(world.config, seed=2, ranks=[2]), "apart")
    blobs = world.home / "registry" / "blobs"
    listed = [set(re.findall(r"sha256:(\w+)", path.read_text())) for path in blobs.rglob("*.parts")]
    shared = sorted(set.intersection(*listed))[0]
    path = blobs / "sha256" / shared[:2] / shared
    data = path.read_bytes()

    path.chmod(0o600)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    for target in targets:
        with pytest.raises(StoreError, match="damaged"):
            pack(adapter_source(config), target)
    path.write_bytes(data[:5])  # shorter than what is mapped of it
    for target in targets:
        with pytest.raises(StoreError, match="damaged"):
            pack(adapter_source(config), target)
    assert pack(adapter_source(config), apart).any()
