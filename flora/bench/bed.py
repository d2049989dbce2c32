"""One device for many measurements: weights, graphs, page-locked memory and loader processes, made ready once.

Half a minute goes by until an engine of the 8B shape can serve, and a measurement takes a quarter of one. Each starts
with an engine that knows of no request and no adapter, over the same device.
"""

import time
from collections.abc import Iterable

import msgspec

from flora.bench.engines import give_back_memory
from flora.serve.config import EngineConfig
from flora.serve.engine import Engine, build_engine, rebuild_engine
from flora.serve.engine.garbage import collect_as_usual, keep_collections_short
from flora.serve.engine.stages import Stages

_SIZES = ("pool_bytes", "max_adapters", "max_sequences", "max_batch_tokens", "host_cache_bytes", "num_loaders")


class Bed:
    """A device under measurement; `with` gives it back. Whoever had an engine must have let go of it."""

    def __init__(self, configs: Iterable[EngineConfig]) -> None:
        """configs  of all engines that will lie on it: one base, one dtype, any sizes and switches"""
        self._built = _widest(list(configs))
        give_back_memory()
        started, self.stages = time.perf_counter(), Stages()
        self._engine: Engine | None = build_engine(self._built, stages=self.stages)
        keep_collections_short()  # as the server's engine does
        self.start_s = round(time.perf_counter() - started, 1)

    def engine(self, config: EngineConfig) -> tuple[Engine, EngineConfig]:
        """A new engine, and its configuration as it runs. The one before must be idle, and is not to be used again."""
        assert self._engine is not None
        config = msgspec.structs.replace(config, num_loaders=self._built.num_loaders)
        self._engine = rebuild_engine(self._engine, self._built, config)
        return self._engine, config

    def __enter__(self) -> "Bed":
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._engine is not None
        self._engine.close()
        self._engine = None
        collect_as_usual()


def _widest(configs: list[EngineConfig]) -> EngineConfig:
    sizes = {name: max(getattr(config, name) for config in configs) for name in _SIZES}
    return msgspec.structs.replace(configs[0], **sizes, slot_bytes=None)  # slots are of the schedule, not of the device
