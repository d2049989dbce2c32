"""An engine over the device and the loaders of another: other switches and sizes, nothing remembered."""

import msgspec
import pytest

from flora.errors import UsageError
from flora.serve.config import EngineConfig
from flora.serve.engine import Engine, rebuild_engine
from flora.serve.request import AdapterTarget
from tests.serve.engine.adapters import random_adapter
from tests.serve.engine.worlds import World, ask, run_to_end

PROMPT = [5, 6, 7, 8] * 8


def built(world: World) -> tuple[Engine, EngineConfig]:
    """An engine, and what it was built from."""
    config = EngineConfig(
        base=world.base,
        registry=str(world.home / "registry"),
        cache_dir=world.home / "cache",
        pool_bytes=16 << 20,
        num_threads=1,
        prefix_cache=True,
        poison=True,
    )
    return world.engine(**msgspec.structs.asdict(config)), config


def answer(engine: Engine, target: AdapterTarget) -> list[int]:
    ask(engine, "r", PROMPT, target)
    return run_to_end(engine)["r"].tokens


def test_a_new_engine_over_an_old_ones_device_has_to_load_and_compute_everything_again(world):
    target = world.add(random_adapter(world.config, seed=1), "a")
    first, config = built(world)
    told = answer(first, target)
    assert (len(first.residency), first.heartbeat().adapter_loads) == (1, 1)

    second = rebuild_engine(first, config, config)

    beat = second.heartbeat()
    assert (beat.resident, beat.host_cache_bytes, beat.steps, beat.prefix_pages) == ((), 0, 0, 0)
    assert answer(second, target) == told
    assert second.heartbeat().adapter_loads == 1
    assert second.heartbeat().prefix_hits == 0
    second.close()


def test_sizes_and_switches_are_those_of_the_new_configuration(world):
    engine, config = built(world)
    smaller = msgspec.structs.replace(
        config, pool_bytes=1 << 20, max_adapters=2, max_sequences=3, max_batch_tokens=9, slo_ttft_s=4.0, cluster=2
    )

    engine = rebuild_engine(engine, config, smaller)

    assert engine.pages.num_pages == engine.ready.num_pages == (1 << 20) // engine.ready.page_bytes
    assert engine.residency.slots.num_slots == 2
    assert (engine.scheduler.limits.max_sequences, engine.scheduler.limits.max_batch_tokens) == (3, 9)
    assert (engine.scheduler.policy.slo_ttft_s, engine.scheduler.policy.cluster) == (4.0, 2)
    engine.close()


def test_slots_are_set_aside_for_one_engine_and_not_for_the_next(world):
    engine, config = built(world)
    page_bytes = engine.ready.page_bytes
    slots = msgspec.structs.replace(config, max_adapters=2, slot_bytes=3 * page_bytes)

    engine = rebuild_engine(engine, config, slots)
    assert engine.pages.num_free == engine.pages.num_usable - 6
    with pytest.raises(UsageError, match="do not fit into a pool"):
        rebuild_engine(engine, config, msgspec.structs.replace(slots, slot_bytes=config.pool_bytes // 2))
    engine = rebuild_engine(engine, config, config)

    assert engine.pages.num_free == engine.pages.num_usable
    engine.close()


def test_pinned_adapters_go_too(world):
    target = world.add(random_adapter(world.config, seed=1), "a")
    engine, _ = built(world)
    answer(engine, target)
    engine.residency.pin(target.serving_digest)

    engine.forget()

    assert (len(engine.residency), engine.residency.pinned_pages, engine.host.num_bytes) == (0, 0, 0)
    engine.close()


@pytest.mark.parametrize("change", [{"pool_bytes": 17 << 20}, {"max_adapters": 257}, {"dtype": "bfloat16"}])
def test_what_the_device_was_not_made_for_is_refused(world, change):
    engine, config = built(world)

    with pytest.raises(UsageError, match=next(iter(change))):
        rebuild_engine(engine, config, msgspec.structs.replace(config, **change))
    engine.close()
