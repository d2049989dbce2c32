"""Loader processes go from load to load by themselves; the engine's thread makes room, and takes what is done."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Semaphore, get_ident

import msgspec
import psutil
import pytest
import torch
from torch import Tensor

from flora.errors import ServeError
from flora.serve.config import EngineConfig
from flora.serve.engine.build import adapter_source
from flora.serve.engine.loading.arena import Arena
from flora.serve.engine.loading.child import Child
from flora.serve.engine.loading.host_cache import HostCache
from flora.serve.engine.loading.loader import Finished, LoadFailed
from flora.serve.engine.loading.packing import PackedAdapter
from flora.serve.engine.loading.processes import ProcessLoader
from flora.serve.engine.loading.seat import MAX_USELESS
from flora.serve.messages import LoadAdapter
from flora.serve.request import AdapterTarget
from tests.serve.engine.adapters import random_adapter
from tests.serve.engine.worlds import World, ask, run_to_end

NUM_WORKERS = 2
NUM_ADAPTERS = 6


@dataclass
class Shop:
    """Loader processes over an arena that six adapters fill, all of one layout, and what each is in memory."""

    loader: ProcessLoader
    arena: Arena
    targets: list[AdapterTarget]
    cells: dict[str, Tensor]
    told: Semaphore  # once for each load that has finished or waits for room

    @property
    def adapter_bytes(self) -> int:
        return self.arena.num_bytes // NUM_ADAPTERS

    def start(self, targets: list[AdapterTarget]) -> None:
        for target in targets:
            self.loader.start(target)

    def hear(self, times: int) -> None:
        """Returns when the loader has spoken that often, without asking what it said."""
        for _ in range(times):
            assert self.told.acquire(timeout=60)

    def take(self, num_loads: int) -> Iterator[Finished]:
        """As many as that, each once it has finished."""
        give_up_s = time.monotonic() + 60
        while num_loads > 0:
            self.loader.give_room()
            finished = self.loader.finished(60.0)
            assert finished or time.monotonic() < give_up_s, f"{num_loads} loads never end"
            yield from finished
            num_loads -= len(finished)

    def is_right(self, finished: Finished) -> bool:
        return isinstance(finished, PackedAdapter) and torch.equal(finished.cells, self.cells[finished.digest])


@contextmanager
def open_shop(base: Path, home: Path) -> Iterator[Shop]:
    world = World(base, home)
    config = EngineConfig(base=world.base, registry=str(home / "registry"), cache_dir=home / "cache")
    source, cells = adapter_source(config), {}
    targets = [
        world.add(random_adapter(world.config, seed, ranks=[4], absent=0), f"a{seed}") for seed in range(NUM_ADAPTERS)
    ]
    for target in targets:
        found = source.find(target)
        cells[target.serving_digest] = torch.zeros(found.num_cells, source.geometry.cell_elements)
        source.pack(found, cells[target.serving_digest])
    source.close()
    arena, told = Arena(sum(each.nbytes for each in cells.values()), pinned=False), Semaphore(0)
    loader = ProcessLoader(config, source.geometry, source.dtype, arena, NUM_WORKERS, told.release)
    try:
        yield Shop(loader, arena, targets, cells, told)
    finally:
        loader.close()


@pytest.fixture(scope="module")
def one_shop(bases, tmp_path_factory) -> Iterator[Shop]:
    with open_shop(bases("llama"), tmp_path_factory.mktemp("shop")) as shop:
        yield shop


@pytest.fixture
def shop(one_shop: Shop) -> Shop:
    """Nothing loaded, and no room to be made."""
    assert one_shop.arena.num_free == one_shop.arena.num_bytes
    assert one_shop.loader.finished() == []
    while one_shop.told.acquire(blocking=False):
        pass
    one_shop.loader.use_cache(lambda num_bytes: False)
    return one_shop


def test_all_that_is_asked_for_is_loaded_during_one_step_of_the_engine(shop):
    shop.start(shop.targets)
    shop.hear(NUM_ADAPTERS)  # the step: nobody asks the loader for anything

    finished = shop.loader.finished()

    assert {each.digest for each in finished} == set(shop.cells)
    assert all(shop.is_right(each) for each in finished)
    for packed in finished:
        packed.release()


@pytest.mark.parametrize("load_s", [0.02, 0.07, 0.5])
def test_behind_a_load_as_many_are_asked_for_as_keep_its_process_busy_for_a_step_of_70_ms(shop, monkeypatch, load_s):
    load_one_in(load_s, shop, monkeypatch)

    num_behind = shop.loader.max_loading // NUM_WORKERS - 1

    assert num_behind * load_s >= 0.07
    assert (num_behind - 1) * load_s < 0.07  # and no more, for they can still be cancelled


def test_after_a_load_that_took_no_time_no_endless_number_is_asked_for(shop, monkeypatch):
    load_one_in(1e-9, shop, monkeypatch)

    assert shop.loader.max_loading <= 10 * NUM_WORKERS


def load_one_in(load_s: float, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads an adapter, and says that it took so long."""
    pack = Child.pack
    monkeypatch.setattr(Child, "pack", lambda child, start: msgspec.structs.replace(pack(child, start), load_s=load_s))
    shop.start(shop.targets[:1])
    (packed,) = shop.take(1)
    packed.release()


def test_an_arena_that_is_too_small_gets_room_from_the_engines_thread_alone(shop):
    held = shop.arena.allocate(4 * shop.adapter_bytes)
    cache, threads = HostCache(shop.arena.num_bytes), []

    def make_room(num_bytes: int) -> bool:
        threads.append(get_ident())
        return cache.free(num_bytes, lambda digest: False)

    shop.loader.use_cache(make_room)
    shop.start(shop.targets)

    loaded = []
    for finished in shop.take(NUM_ADAPTERS):
        assert shop.is_right(finished)
        loaded.append(finished.digest)
        cache.put(finished)

    assert set(loaded) == set(shop.cells)
    assert set(threads) == {get_ident()}
    cache.free(cache.num_bytes, lambda digest: False)
    shop.arena.release(held, 4 * shop.adapter_bytes)


def test_where_the_arena_is_full_room_is_made_for_the_next_load_of_each_process_when_it_is_asked_for(shop):
    cache = HostCache(shop.arena.num_bytes)
    shop.start(shop.targets)
    for finished in shop.take(NUM_ADAPTERS):
        cache.put(finished)
    shop.hear(NUM_ADAPTERS)
    shop.loader.use_cache(lambda num_bytes: cache.free(num_bytes, lambda digest: False))

    shop.start(shop.targets[:NUM_WORKERS])
    shop.hear(NUM_WORKERS)  # without another word from the engine

    again = shop.loader.finished()
    assert len(again) == NUM_WORKERS
    assert all(shop.is_right(each) for each in again)
    assert cache.num_bytes == (NUM_ADAPTERS - NUM_WORKERS) * shop.adapter_bytes
    for packed in again:
        packed.release()
    cache.free(cache.num_bytes, lambda digest: False)


def test_what_a_step_brings_to_the_device_makes_room_in_that_step_for_loads_that_wait(bases, tmp_path):
    with open_shop(bases("llama"), tmp_path) as shop:
        engine = World(bases("llama"), tmp_path).engine(shop.loader)
        shop.arena.allocate((NUM_ADAPTERS - NUM_WORKERS) * shop.adapter_bytes)
        for target in shop.targets[: 2 * NUM_WORKERS]:
            engine.load_adapter(LoadAdapter(request_id=target.label, adapter=target))
        engine.step()
        shop.hear(2 * NUM_WORKERS)  # half of them are there, and the others wait for their room

        engine.step()

        shop.hear(NUM_WORKERS)  # without another word from the engine
        engine.step()
        assert {each.label for each in engine.heartbeat().resident} == {f"a{i}" for i in range(2 * NUM_WORKERS)}


def test_an_engine_tells_the_same_whether_a_thread_loads_or_processes_whose_arena_is_small(world):
    targets = [world.add(random_adapter(world.config, seed, ranks=[8], absent=0.0), f"a{seed}") for seed in range(5)]

    def tell(num_loaders: int, host_cache_bytes: int) -> list[list[int]]:
        engine = world.engine(max_adapters=2, num_loaders=num_loaders, host_cache_bytes=host_cache_bytes)
        for number in range(10):
            ask(engine, str(number), [1, 2, 3, number], targets[number % 5])
        answers = run_to_end(engine)
        engine.close()
        return [answers[str(number)].tokens for number in range(10)]

    by_a_thread = tell(0, host_cache_bytes=1 << 20)

    assert tell(NUM_WORKERS, host_cache_bytes=1 << 17) == by_a_thread
    assert all(by_a_thread)


@pytest.mark.parametrize("when", ["find", "pack"])
def test_an_error_that_nobody_foresaw_fails_its_load_alone_and_the_thread_goes_on(shop, monkeypatch, caplog, when):
    ask_child = getattr(Child, when)
    first_ones = iter(range(NUM_WORKERS))

    def misunderstand(child: Child, *asked: object) -> object:
        said = ask_child(child, *asked)
        if next(first_ones, None) is not None:
            raise msgspec.ValidationError("not what a loader process says")
        return said

    monkeypatch.setattr(Child, when, misunderstand)
    shop.start(shop.targets)

    finished = list(shop.take(NUM_ADAPTERS))

    failed = [each for each in finished if isinstance(each, LoadFailed)]
    labels = {target.serving_digest: target.label for target in shop.targets}
    assert len(failed) == NUM_WORKERS
    for each in failed:
        assert isinstance(each.error, ServeError)
        assert f"adapter {labels[each.digest]} could not be loaded" in str(each.error)
        assert "not what a loader process says" in str(each.error)
        assert f"adapter load failed label={labels[each.digest]}" in caplog.messages
    packed = [each for each in finished if isinstance(each, PackedAdapter)]
    assert len(packed) == NUM_ADAPTERS - NUM_WORKERS
    assert all(shop.is_right(each) for each in packed)
    for each in packed:
        each.release()
    shop.start(shop.targets)  # no range is lost, and no load is expected in vain
    for each in shop.take(NUM_ADAPTERS):
        assert shop.is_right(each)
        each.release()


def test_an_adapter_that_no_arena_holds_fails_alone_and_not_the_next_one_of_its_process(bases, tmp_path):
    with open_shop(bases("llama"), tmp_path) as shop:
        world = World(bases("llama"), tmp_path)
        large = world.add(random_adapter(world.config, 99, ranks=[64], absent=0), "large")
        shop.start([large, large, *shop.targets])

        finished = list(shop.take(2 + NUM_ADAPTERS))

        failed = [each for each in finished if isinstance(each, LoadFailed)]
        assert [each.digest for each in failed] == [large.serving_digest] * 2
        assert all("does not fit" in str(each.error) for each in failed)
        assert sum(shop.is_right(each) for each in finished) == NUM_ADAPTERS


def test_a_file_that_cannot_be_read_fails_its_load_alone_and_its_process_goes_on(bases, tmp_path):
    with open_shop(bases("llama"), tmp_path) as shop:
        world = World(bases("llama"), tmp_path)
        known = set(blobs(world))
        target = world.add(random_adapter(world.config, 99, ranks=[4], absent=0), "unreadable")
        weights = max(set(blobs(world)) - known, key=lambda blob: blob.stat().st_size)
        weights.unlink()
        weights.mkdir()  # whoever opens it is told so by the system
        processes = loader_processes()
        shop.start([target] * NUM_WORKERS)

        failed = list(shop.take(NUM_WORKERS))

        assert [each.digest for each in failed if isinstance(each, LoadFailed)] == [target.serving_digest] * NUM_WORKERS
        assert all(process.is_running() for process in processes)
        shop.start(shop.targets)
        assert all(shop.is_right(each) for each in shop.take(NUM_ADAPTERS))


def blobs(world: World) -> list[Path]:
    return [path for path in (world.home / "registry" / "blobs").rglob("*") if path.is_file()]


def test_a_process_that_dies_fails_its_load_alone_and_another_one_follows_it(bases, tmp_path):
    with open_shop(bases("llama"), tmp_path) as shop:
        first, second = loader_processes()
        held = shop.arena.allocate(shop.arena.num_bytes)
        shop.start(shop.targets[:2])
        shop.hear(2)  # each waits for room
        kill(first)
        shop.arena.release(held, shop.arena.num_bytes)

        failed, sound = sorted(shop.take(2), key=lambda each: isinstance(each, PackedAdapter))
        assert isinstance(failed, LoadFailed)
        assert isinstance(failed.error, ServeError)
        assert "killed by SIGKILL" in failed.error.what
        assert "ask again" in failed.error.fix
        assert shop.is_right(sound)
        assert shop.arena.num_free == 5 * shop.adapter_bytes  # the dead one's range is free again

        shop.start(shop.targets[2:])
        assert all(shop.is_right(each) for each in shop.take(4))

        kill(second)  # none of the first is left
        assert shop.arena.num_free == shop.adapter_bytes
        shop.start(shop.targets[:1])
        assert all(shop.is_right(each) for each in shop.take(1))


def test_processes_that_cannot_even_start_are_not_started_for_ever(bases, tmp_path, monkeypatch):
    base, started = tmp_path / "base", []
    shutil.copytree(bases("llama"), base)
    start = Child.__init__

    def count(child: Child, *arguments: object) -> None:
        started.append(child)
        start(child, *arguments)

    with open_shop(base, tmp_path) as shop:
        shop.start(shop.targets)
        for each in shop.take(NUM_ADAPTERS):
            each.release()
        monkeypatch.setattr(Child, "__init__", count)
        (base / "config.json").unlink()
        for process in loader_processes():
            kill(process)

        errors = []
        for _ in range(2 * NUM_WORKERS * MAX_USELESS):  # nobody waits in vain
            shop.start(shop.targets[:1])
            errors += [each.error for each in shop.take(1)]

        assert len(started) <= NUM_WORKERS * MAX_USELESS
        assert errors[-1].what == "no loader process is left"
        assert "restart the server" in errors[-1].fix
        assert shop.arena.num_free == shop.arena.num_bytes


def test_a_process_that_dies_idle_fails_no_load(bases, tmp_path):
    with open_shop(bases("llama"), tmp_path) as shop:
        kill(loader_processes()[0])
        shop.start(shop.targets)
        assert all(shop.is_right(each) for each in shop.take(NUM_ADAPTERS))


def test_closing_ends_loads_that_wait_for_room_and_those_that_wait_for_a_process(bases, tmp_path):
    with open_shop(bases("llama"), tmp_path) as shop:
        processes = loader_processes()
        shop.arena.allocate(shop.arena.num_bytes)
        shop.start(shop.targets)
        shop.hear(NUM_WORKERS)

    assert not any(process.is_running() for process in processes)


def loader_processes() -> list[psutil.Process]:
    """The latest loader's."""
    ours = [each for each in psutil.Process().children() if "flora.serve.engine.loading.worker" in each.cmdline()]
    return sorted(ours, key=lambda each: each.create_time())[-NUM_WORKERS:]


def kill(process: psutil.Process) -> None:
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and its exit code still there for the loader
