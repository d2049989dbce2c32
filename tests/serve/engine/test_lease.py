"""What a running server has read stays readable for it, though its version be removed and the registry collected."""

import subprocess
import sys

import pytest
import torch

from flora.errors import AdapterNotFound
from flora.serve.config import EngineConfig
from flora.serve.engine.build import adapter_source
from flora.serve.engine.loading.arena import Arena
from flora.serve.engine.loading.loader import Finished
from flora.serve.engine.loading.packing import PackedAdapter
from flora.serve.engine.loading.processes import ProcessLoader
from flora.serve.messages import UnloadAdapter
from tests.serve.engine.adapters import random_adapter
from tests.serve.engine.worlds import World, ask, run_to_end

COLLECT = """
import sys
from flora.registry import Registry
with Registry.open(sys.argv[1], create=False) as registry:
    report = registry.gc(grace_s=0)
    print(len(report.removed), report.kept_leased)
"""


def remove_and_collect(world: World, name: str) -> tuple[int, int]:
    """Blobs that a gc in a process of its own takes once the name is gone, and those that it leaves to a server."""
    with world.registry as registry:
        registry.remove(name, force=True)
    command = [sys.executable, "-c", COLLECT, str(world.home / "registry")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    removed, leased = map(int, done.stdout.split())
    return removed, leased


def test_a_version_that_the_loader_has_found_can_be_packed_after_its_removal_and_a_gc(world):
    """The same for an engine's thread and for a loader process: both read through this source."""
    config = EngineConfig(base=world.base, registry=str(world.home / "registry"), cache_dir=world.home / "cache")
    source = adapter_source(config)
    target = world.add(random_adapter(world.config, seed=1, ranks=[2]), "sql")
    found = source.find(target)
    before, after = (torch.zeros(found.num_cells, source.geometry.cell_elements) for _ in range(2))
    source.pack(found, before)
    world.add(random_adapter(world.config, seed=2, ranks=[2]), "unused")

    assert remove_and_collect(world, "unused") == (2, 0)  # manifest and weights
    assert remove_and_collect(world, "sql") == (0, 2)

    source.pack(source.find(target), after)
    assert torch.equal(after, before)
    assert before.any()
    source.close()
    with pytest.raises(AdapterNotFound):  # nobody has a lease of it any more
        adapter_source(config).find(target)


def test_every_loader_process_of_a_server_loads_what_one_of_them_has_a_lease_of(world):
    """One has read it before its removal. Then both are asked at once, for a stream that had resolved the name."""
    config = EngineConfig(base=world.base, registry=str(world.home / "registry"), cache_dir=world.home / "cache")
    target = world.add(random_adapter(world.config, seed=1, ranks=[2]), "sql")
    geometry = adapter_source(config).geometry
    loader = ProcessLoader(config, geometry, torch.float32, Arena(1 << 20, pinned=False), 2, lambda: None)
    loader.use_cache(lambda num_bytes: False)

    def load(times: int) -> list[Finished]:
        for _ in range(times):
            loader.start(target)
        finished: list[Finished] = []
        while len(finished) < times:
            finished += loader.finished(60.0)
        return finished

    try:
        (before,) = load(1)
        assert remove_and_collect(world, "sql") == (0, 2)
        both = load(2)
    finally:
        loader.close()

    assert isinstance(before, PackedAdapter)
    for after in both:
        assert isinstance(after, PackedAdapter), after
        assert torch.equal(after.cells, before.cells)
    assert before.cells.any()


def test_a_stream_gets_its_removed_adapter_back_after_it_was_unloaded(world):
    target = world.add(random_adapter(world.config, seed=1, ranks=[2]), "sql")
    engine = world.engine(host_cache_bytes=0)
    ask(engine, "first", [1, 2, 3], target)
    (first,) = run_to_end(engine).values()
    engine.unload_adapter(UnloadAdapter(request_id="unload", serving_digest=target.serving_digest))

    assert remove_and_collect(world, "sql") == (0, 2)

    ask(engine, "second", [1, 2, 3], target)  # it had resolved the name before
    (second,) = [answer for key, answer in run_to_end(engine).items() if key == "second"]
    engine.close()
    assert second.tokens == first.tokens
