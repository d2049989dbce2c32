"""An engine again, over the device and the loaders of one that is done: half a minute less than building it anew.

What takes long when an engine starts is the same whatever it serves: weights, captured graphs, page-locked host memory,
loader processes. What tells two engines apart is integers, and those start afresh.
"""

from dataclasses import fields

import msgspec

from flora.errors import UsageError
from flora.serve.config import EngineConfig
from flora.serve.engine.engine import Engine
from flora.serve.engine.schedule.pages import PagePool
from flora.serve.engine.schedule.policy import Policy
from flora.serve.engine.schedule.scheduler import Limits
from flora.serve.engine.schedule.slots import pages_of_slot

_BOUNDS = ("pool_bytes", "max_adapters", "max_sequences", "max_batch_tokens", "host_cache_bytes")
_FREE = {*_BOUNDS, "max_waiting", "slot_bytes", "poison", *(field.name for field in fields(Policy))}


def rebuild_engine(old: Engine, built: EngineConfig, config: EngineConfig) -> Engine:
    """An engine that knows of no request and no adapter, with the pool, the limits and the switches of `config`.

    old    idle, and not to be used any more: its weights, its device memory and its loaders serve on
    built  what the first engine over this device was built from
    Raises UsageError where `config` asks for more than that, for another base, dtype or context, or for slots that do
    not fit into its pool.
    """
    for name in config.__struct_fields__:
        there, asked = getattr(built, name), getattr(config, name)
        if asked > there if name in _BOUNDS else asked != there and name not in _FREE:
            raise UsageError(
                f"an engine built with {name} {there} cannot go on with {asked}", fix="build the largest engine first"
            )
    num_pages = config.pool_bytes // old.ready.page_bytes
    slot_pages = pages_of_slot(config.slot_bytes, config.max_adapters, num_pages, old.ready.page_bytes)
    old.forget()
    return Engine(
        msgspec.structs.replace(old.ready, num_pages=num_pages),
        old.runner,
        PagePool(num_pages, remember_freed=config.poison),
        Limits(config.page_tokens, config.max_sequences, config.max_batch_tokens, config.max_waiting),
        Policy(**{field.name: getattr(config, field.name) for field in fields(Policy)}),
        old.loader,
        num_slots=config.max_adapters,
        slot_pages=slot_pages,
        host_cache_bytes=config.host_cache_bytes,
    )
