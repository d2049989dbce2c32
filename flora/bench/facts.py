"""What goes into a row beside the figures: what was asked, what ran, and where."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

import flora
from flora.bench.row import Row
from flora.bench.settings import ServeBench
from flora.bench.trace import Trace
from flora.serve.config import EngineConfig
from flora.serve.request import AdapterTarget

_SIZES = {  # fields of EngineConfig that have columns of their own, or say where things lie
    "base", "registry", "cache_dir", "device", "dtype", "pool_bytes", "max_sequences", "max_batch_tokens",
    "host_cache_bytes", "dummy_weights", "max_waiting", "poison",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What only the caller knows."""

    commit: str | None  # of the code that runs
    gpu: str | None  # its name; None: a CPU, or unknown


def make_row(**facts: Any) -> Row:
    """The row of these facts. A fact that no row has, or of another type, is a bug of ours."""
    return msgspec.convert(facts, Row, strict=True)


def workload_facts(bench: ServeBench, trace: Trace, num_adapters: int, seed: int) -> dict[str, Any]:
    setting = bench.setting
    return {
        "shape": setting.shape,
        "modules": setting.modules,
        "adapters": num_adapters,
        "distinct": trace.num_distinct if num_adapters else 0,
        "ranks": list(setting.ranks),
        "requests": trace.num_requests,
        "lengths": list(setting.lengths),
        "rate": bench.rate,
        "alpha": bench.alpha,
        "temperature": bench.temperature,
        "top_p": bench.top_p,
        "cv": bench.cv,
        "seed": seed,
        "merged": bench.merged,
        "merged_turn_tokens": bench.merged_turn_tokens,
        "beside": bench.beside,
        "fixed_slots": setting.fixed_slots,
    }


def engine_facts(config: EngineConfig) -> dict[str, Any]:
    """What runs here, and how it is sized."""
    return {
        "version": flora.__version__,
        "device": config.device,
        "torch": _version_of("torch"),
        "triton": _version_of("triton") if config.device != "cpu" else None,
        "max_batch_tokens": config.max_batch_tokens,
        "max_sequences": config.max_sequences,
        "pool_gib": round(config.pool_bytes / 2**30, 1),
        "host_gib": round(config.host_cache_bytes / 2**30, 1),
        "switches": {name: _plain(getattr(config, name)) for name in config.__struct_fields__ if name not in _SIZES},
    }


def _plain(value: Any) -> Any:
    return value.label if isinstance(value, AdapterTarget) else value


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
