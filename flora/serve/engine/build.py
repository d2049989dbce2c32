"""An engine from its configuration: opens the base, sizes the pool, and puts the parts together."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace

import torch

from flora.checkpoint import Checkpoint, open_checkpoint
from flora.errors import UsageError
from flora.identity import BaseRecord, base_record
from flora.kernels import Ops
from flora.serve.config import EngineConfig
from flora.serve.engine.cpu.ops import CpuOps
from flora.serve.engine.engine import Engine
from flora.serve.engine.layout import PoolGeometry
from flora.serve.engine.loading.arena import Arena
from flora.serve.engine.loading.loader import Loader, ThreadLoader
from flora.serve.engine.loading.narrowing import FP8
from flora.serve.engine.loading.processes import ProcessLoader
from flora.serve.engine.loading.source import RegistrySource
from flora.serve.engine.merge import merge_into
from flora.serve.engine.model.config import ModelConfig, parse_model_config, resolve_max_context
from flora.serve.engine.model.llama import LlamaModel
from flora.serve.engine.model.weights import ModelWeights, draw_weights, load_weights
from flora.serve.engine.pool import DevicePool
from flora.serve.engine.runner import Runner, SerialRunner
from flora.serve.engine.schedule.pages import PagePool
from flora.serve.engine.schedule.policy import Policy
from flora.serve.engine.schedule.scheduler import Limits
from flora.serve.engine.schedule.slots import pages_of_slot
from flora.serve.engine.stages import Stages
from flora.serve.messages import Ready

logger = logging.getLogger(__name__)

_ADAPTER_DTYPES = {"float8_e4m3fn": FP8}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_OPS = ("lora_shrink", "lora_expand", "paged_attention", "rms_norm", "rope_store", "silu_mul")
_PREPARING = {
    "cpu": "making ready for steps",
    "cuda": "capturing steps; a machine's first start compiles their kernels, which takes up to a minute on 16 cores",
}
_FP8_CAPABILITY = (8, 9)
_MAX_CELLS = 8192  # of an adapter on a GPU, before graphs are captured anew: 512 MiB of 64 KiB cells


def build_engine(
    config: EngineConfig,
    *,
    loader: Loader | None = None,
    on_loaded: Callable[[], None] = lambda: None,
    stages: Stages | None = None,
) -> Engine:
    """An engine ready for requests.

    loader     where adapters come from; None: the registry that the configuration names
    on_loaded  called from a loader's thread after each load: wakes whoever waits for the engine to have work
    stages     learns how long each part of the start takes
    Raises CheckpointError, ShapeMismatch, NotFound, UsageError; where an adapter is merged, what merge_into raises.
    """
    stages = stages or Stages()
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    dtype, adapter_dtype, device = _dtype(config.dtype), _adapter_dtype(config), _device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        _check_knows(device, adapter_dtype)
        torch.backends.cuda.matmul.allow_tf32 = False
    checkpoint = _open_base(config)
    model_config = parse_model_config(checkpoint.config)
    geometry = pool_geometry(model_config, config, dtype.itemsize)
    slot_pages = pages_of_slot(config.slot_bytes, config.max_adapters, geometry.num_pages, geometry.page_bytes)
    kv_pages = geometry.num_pages - 1 - config.max_adapters * (slot_pages or 0)
    pool_tokens = kv_pages * geometry.page_tokens
    max_context = resolve_max_context(model_config, checkpoint.config, config.max_context, pool_tokens)
    with stages.begin("base", f"reading the base {config.base}"):
        record = base_record(checkpoint, config.cache_dir)
        weights = _weights(config, checkpoint, record, model_config, device)
    ops = choose_ops(device, batch_invariant=config.batch_invariant)
    ready = Ready(
        base_id=str(record.base_id),
        max_context=max_context,
        vocab_size=model_config.vocab_size,
        num_pages=geometry.num_pages,
        page_tokens=geometry.page_tokens,
        page_bytes=geometry.page_bytes,
        device=str(device),
        dtype=config.dtype,
        kernels=dict.fromkeys(_OPS, ops.name),
        engine_pid=os.getpid(),
        merged=config.merge.serving_digest if config.merge else None,
    )
    limits = Limits(config.page_tokens, config.max_sequences, config.max_batch_tokens, config.max_waiting)
    model = LlamaModel(model_config, weights, max_context, ops)
    pool = DevicePool(geometry, dtype, device, adapter_dtype)
    if loader is None:  # after what fails at once for want of memory: its processes and page-locked memory take a while
        with stages.begin("loaders", f"{config.host_cache_bytes / 2**30:.1f} GiB of host memory for adapters"):
            loader = _make_loader(config, geometry, adapter_dtype, device, on_loaded)
    with stages.begin("steps", _PREPARING[device.type]):
        runner = _make_runner(config, model, pool, limits, max_context)
    logger.info("engine built: %s", stages)
    return Engine(
        ready,
        runner,
        PagePool(geometry.num_pages, remember_freed=config.poison),
        limits,
        _policy(config),
        loader,
        num_slots=config.max_adapters,
        slot_pages=slot_pages,
        host_cache_bytes=config.host_cache_bytes,
    )


def _weights(
    config: EngineConfig, checkpoint: Checkpoint, record: BaseRecord, model_config: ModelConfig, device: torch.device
) -> ModelWeights:
    dtype = _dtype(config.dtype)
    if config.dummy_weights:
        return draw_weights(model_config, dtype, device, row_invariant=config.batch_invariant)
    if config.merge is None:
        return load_weights(checkpoint, model_config, dtype, device, row_invariant=config.batch_invariant)
    merged = merge_into(
        checkpoint, record, config.registry, config.merge, allow_base_mismatch=config.allow_base_mismatch
    )
    weights = load_weights(merged, model_config, dtype, device, row_invariant=config.batch_invariant)
    merged.check_all_loaded()
    logger.info("adapter merged label=%s digest=%s", config.merge.label, config.merge.serving_digest)
    return weights


def _policy(config: EngineConfig) -> Policy:
    return Policy(
        fairness=config.fairness,
        max_wait_s=config.max_wait_s,
        slo_ttft_s=config.slo_ttft_s,
        cluster=config.cluster,
        prefetch=config.prefetch,
        prefix_cache=config.prefix_cache,
    )


def adapter_source(config: EngineConfig) -> RegistrySource:
    """Where an engine of this configuration reads its adapters; the same in every process."""
    checkpoint = _open_base(config)
    model_config, dtype = parse_model_config(checkpoint.config), _dtype(config.dtype)
    return RegistrySource(
        config.registry,
        model_config,
        base_record(checkpoint, config.cache_dir),
        pool_geometry(model_config, config, dtype.itemsize),
        _adapter_dtype(config),
        allow_base_mismatch=config.allow_base_mismatch,
    )


def _open_base(config: EngineConfig) -> Checkpoint:
    if config.dummy_weights:
        return Checkpoint(config.base, json.loads((config.base / "config.json").read_bytes()), {})
    return open_checkpoint(config.base)


def _make_loader(
    config: EngineConfig,
    geometry: PoolGeometry,
    dtype: torch.dtype,
    device: torch.device,
    on_loaded: Callable[[], None],
) -> Loader:
    """dtype  of adapters in the pool"""
    if not config.num_loaders:
        return ThreadLoader(adapter_source(config), on_loaded)
    arena = Arena(config.host_cache_bytes, pinned=device.type == "cuda")
    return ProcessLoader(config, geometry, dtype, arena, config.num_loaders, on_loaded)


def _make_runner(config: EngineConfig, model: LlamaModel, pool: DevicePool, limits: Limits, max_context: int) -> Runner:
    if pool.cells.device.type != "cuda":
        return SerialRunner(model, pool, config.max_adapters)
    from flora.serve.engine.cuda.runner import CudaRunner

    runner = CudaRunner(
        model,
        pool,
        config.max_adapters,
        limits,
        max_context,
        max_cells=_MAX_CELLS,
        batch_invariant=config.batch_invariant,
        beside_rows=config.beside_rows,
    )
    runner.prepare()
    return runner


def pool_geometry(model: ModelConfig, config: EngineConfig, itemsize: int) -> PoolGeometry:
    """The pool that `config.pool_bytes` holds. Raises UsageError if that is less than a page beside the null page."""
    geometry = PoolGeometry(
        num_planes=model.num_layers,
        num_pages=0,
        page_tokens=config.page_tokens,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        itemsize=itemsize,
        adapter_itemsize=_adapter_dtype(config).itemsize if config.adapter_dtype else None,
    )
    num_pages = config.pool_bytes // geometry.page_bytes
    if num_pages < 2:
        raise UsageError(
            f"a pool of {config.pool_bytes} bytes holds no page of {geometry.page_bytes} bytes",
            fix="give the server a larger pool",
        )
    return replace(geometry, num_pages=num_pages)


def choose_ops(device: torch.device, *, batch_invariant: bool = False) -> Ops:
    """Plain torch on a CPU, Triton on a GPU: never one for want of the other."""
    if device.type == "cpu":
        return CpuOps()
    from flora.kernels import TritonOps  # needs Triton

    return TritonOps.for_device(device, batch_invariant=batch_invariant)


def _device(name: str) -> torch.device:
    """Raises UsageError for a GPU that PyTorch does not find."""
    device = torch.device(name)
    if device.type != "cuda":
        return device
    device, count = torch.device("cuda", device.index or 0), torch.cuda.device_count()
    if device.index >= count:
        raise UsageError(
            f"there is no GPU {name} to serve on",
            cause=f"PyTorch {torch.__version__} finds {count or 'none'}",
            fix=f"give --device {'cuda:0' if count else 'cpu'}; `flora doctor` says what keeps PyTorch from a GPU",
        )
    return device


def _adapter_dtype(config: EngineConfig) -> torch.dtype:
    """Of adapters in the pool. Raises UsageError."""
    if config.adapter_dtype in (None, config.dtype):
        return _dtype(config.dtype)
    if config.adapter_dtype not in _ADAPTER_DTYPES:
        raise UsageError(
            f"{config.adapter_dtype!r} is not a dtype of adapters in a pool of {config.dtype}",
            fix=f"choose {', '.join(_ADAPTER_DTYPES)}, or none: adapters are then kept as keys and values are",
        )
    if config.dtype == "float16":
        raise UsageError(
            "adapters in float8 go with a base in bfloat16 or float32, not in float16",
            cause="factors in fp8 fill its range, and what they make of activations does not fit that of float16",
            fix="serve the base in bfloat16, or leave --adapter-dtype out",
        )
    return _ADAPTER_DTYPES[config.adapter_dtype]


def _check_knows(device: torch.device, adapter_dtype: torch.dtype) -> None:
    """Raises UsageError for fp8 on a GPU that has no instructions for it."""
    if adapter_dtype == FP8 and torch.cuda.get_device_capability(device) < _FP8_CAPABILITY:
        raise UsageError(
            f"{torch.cuda.get_device_name(device)} knows no float8",
            cause="GPUs from Ada and Hopper on do: compute capability 8.9",
            fix="leave --adapter-dtype out",
        )


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise UsageError(f"{name!r} is not a dtype of the pool", fix=f"choose one of {', '.join(_DTYPES)}")
    return _DTYPES[name]
