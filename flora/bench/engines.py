"""The world of an engine under measurement: a base without weights, a registry of random adapters, a sized engine."""

import gc
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from flora.bench.registering import register_random_adapters
from flora.bench.settings import ServeBench, Setting
from flora.bench.shapes import MODULE_SETS, SHAPES, features, module_names, write_config
from flora.serve.config import EngineConfig
from flora.serve.engine import Engine, build_engine
from flora.serve.engine.build import pool_geometry
from flora.serve.engine.garbage import collect_as_usual, keep_collections_short
from flora.serve.engine.layout import stream_alignment
from flora.serve.engine.model.config import parse_model_config
from flora.serve.request import AdapterTarget

_SMALL_CACHE_BYTES = 3 << 29  # the least: pinning memory takes a second for every few GiB, so no more than is useful
_SMALL_WORLD_BYTES = 64 << 20  # less than what drawing them takes, a process takes to start
_CACHE_SLACK = 1.25  # pages are filled to their end, and an arena has gaps
_ROW_ELEMENTS = 64  # that each row of a factor is filled up to a multiple of, on the device
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True)
class World:
    """What engines under measurement share: a base without weights, and a registry of random adapters."""

    folder: Path
    bench: ServeBench
    targets: Mapping[int, AdapterTarget]  # adapter number -> what requests name

    def config(self, numbers: Iterable[int]) -> EngineConfig:
        """The engine's, for requests that want these adapters."""
        config, setting = self.bench.engine, self.bench.setting
        wanted = list(numbers)
        if setting.fixed_slots is not None:
            slots = {"max_adapters": setting.fixed_slots, "slot_bytes": slot_bytes(config, setting)}
            config = msgspec.structs.replace(config, **slots)
        return msgspec.structs.replace(
            config,
            base=self.folder / "base",
            registry=str(self.folder / "registry"),
            cache_dir=self.folder / "cache",
            dummy_weights=True,
            host_cache_bytes=host_cache_bytes(config, setting, wanted),
            num_loaders=config.num_loaders if wanted else 0,
        )


def make_world(folder: Path, bench: ServeBench, numbers: Iterable[int]) -> World:
    """Writes config.json and registers the adapters of these numbers."""
    write_config(folder / "base", bench.setting.shape)
    return World(folder, bench, register_adapters(folder, bench.setting, numbers))


def register_adapters(
    folder: Path, setting: Setting, numbers: Iterable[int], *, prefix: str | None = None
) -> dict[int, AdapterTarget]:
    """Into the registry of a world, on all cores if that is much work.

    prefix  of the adapters' names, where a registry holds those of several settings
    """
    wanted = set(numbers)
    is_small = sum(adapter_bytes(setting, number, "bfloat16") for number in wanted) < _SMALL_WORLD_BYTES
    return register_random_adapters(
        folder / "registry",
        setting.shape,
        setting.modules,
        setting.ranks,
        wanted,
        padded_rank=max(setting.ranks) if setting.is_padded else None,
        num_processes=1 if is_small else os.cpu_count() or 1,
        prefix=prefix,
    )


@contextmanager
def running_engine(config: EngineConfig) -> Iterator[Engine]:
    """An engine, closed at the end. Whoever had one before must have let go of it: two do not fit on a GPU."""
    give_back_memory()
    engine = build_engine(config)
    keep_collections_short()  # as the server's engine does
    try:
        yield engine
    finally:
        engine.close()
        collect_as_usual()


def give_back_memory() -> None:
    """Of an engine that nobody holds any more: it is full of cycles, and has most of a GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def host_cache_bytes(config: EngineConfig, setting: Setting, numbers: Iterable[int]) -> int:
    """What these adapters can fill, at most as much as the configuration allows."""
    needed = sum(adapter_bytes(setting, number, adapter_dtype(config)) for number in numbers)
    return min(config.host_cache_bytes, max(_SMALL_CACHE_BYTES, math.ceil(_CACHE_SLACK * needed)))


def adapter_dtype(config: EngineConfig) -> str:
    """Of adapters in host memory and on the device."""
    return config.adapter_dtype or config.dtype


def adapter_bytes(setting: Setting, number: int, dtype: str) -> int:
    """Of one adapter's factors."""
    return setting.rank(number) * sum(_widths(setting)) * _ITEM_BYTES[dtype]


def slot_bytes(config: EngineConfig, setting: Setting) -> int:
    """Of the engine's pool, that hold any adapter of the setting's largest rank."""
    model = parse_model_config(SHAPES[setting.shape])
    alignment = stream_alignment(model, pool_geometry(model, config, _ITEM_BYTES[config.dtype]))
    matrices = [max(setting.ranks) * _filled(width, _ROW_ELEMENTS) for width in _widths(setting)]
    return sum(_filled(elements, alignment) for elements in matrices) * _ITEM_BYTES[adapter_dtype(config)]


def _widths(setting: Setting) -> list[int]:
    """Of the rows of each factor of an adapter: inputs of A and outputs of B, module by module."""
    names = module_names(setting.shape, MODULE_SETS[setting.modules])
    return [size for module, _ in names for size in features(setting.shape, module)]


def _filled(count: int, unit: int) -> int:
    """Up to whole units."""
    return -(-count // unit) * unit
