"""How one server runs: built once by the CLI, handed down whole, written as JSON for the engine process."""

from pathlib import Path
from typing import Any

import msgspec

from flora.serve.request import AdapterTarget


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the engine process needs; every number is concrete here."""

    base: Path  # folder of the base checkpoint
    registry: str  # folder or URL that Registry.open takes
    cache_dir: Path  # of file hashes
    device: str = "cpu"
    dtype: str = "float32"  # of weights, KV and adapters in the pool; bfloat16 on a GPU
    adapter_dtype: str | None = None  # of adapters in the pool: float8_e4m3fn, a byte a number; None: as dtype
    page_tokens: int = 16
    pool_bytes: int = 2 << 30  # KV and adapters together
    max_context: int | None = None  # tokens; None: the model's own, or less where the pool holds less
    merge: AdapterTarget | None = None  # the one adapter to serve, merged into the base's weights
    allow_base_mismatch: bool = False  # serve adapters of other base weights too; each is recorded in the registry
    max_sequences: int = 64  # running at once
    max_batch_tokens: int = 512  # rows a step, fewer where many decode (Limits.rows_of_step): bounds gaps of tokens
    max_waiting: int = 4096  # requests in the queue before new ones are refused
    max_adapters: int = 256  # resident at once: rows of the kernels' tables
    slot_bytes: int | None = None  # of the pool, set aside for each of them; None: adapters take the pages they need
    prefix_cache: bool = True  # keep KV pages for requests with the same adapter that begin with the same tokens
    fairness: bool = True  # the adapter that was served least goes first, not the request that came first
    max_wait_s: float = 5.0  # how long a request without room, or an adapter without a turn, may be overtaken
    slo_ttft_s: float | None = None  # refuse who can no longer have a first token so soon; None: everybody waits
    cluster: int | None = None  # once so many adapters run, requests for those go first; None: no matter which run
    prefetch: bool = True  # load adapters when their requests arrive, not when their turn comes
    host_cache_bytes: int = 4 << 30  # packed adapters kept in host memory
    num_loaders: int = 0  # processes that load adapters; 0: a thread of the engine's process
    dummy_weights: bool = False  # benchmarks: a base drawn at random from config.json alone
    num_threads: int | None = None  # of torch on a CPU; None: its own choice
    batch_invariant: bool = False  # a row's bits are the same in steps of any size; on a CPU they are so in any case
    beside_rows: int = 256  # on a GPU, in steps of at most so many rows, LoRA runs beside the base's products; 0: never
    poison: bool = False  # tests: refill freed pages with NaN


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One server: its engine, who may ask it, and how long it waits for each of them."""

    engine: EngineConfig
    base_name: str  # the base's model id on the API
    host: str = "127.0.0.1"
    port: int = 8000
    preload: tuple[str, ...] = ()  # references to make resident before the first request
    drain_s: float = 30.0  # on SIGTERM: how long running requests may take to finish
    max_body_bytes: int = 4 << 20
    header_timeout_s: float = 10.0  # for the head of a request
    body_timeout_s: float = 60.0  # for its whole body
    write_timeout_s: float = 60.0  # for a client to take anything of its answer
    keepalive_s: float = 15.0  # SSE comment while nothing else is sent
    engine_silence_s: float = 10.0  # without a heartbeat for so long, the engine counts as dead
    api_keys: tuple[str, ...] = ()  # none: loopback only, every request has all scopes
    insecure: bool = False  # without keys, let other machines in all the same


def encode_engine_config(config: EngineConfig) -> bytes:
    """JSON for the file that `python -m flora.serve.engine --config FILE` reads."""
    return msgspec.json.encode(config, enc_hook=str)  # paths are the only fields that JSON does not know


def decode_engine_config(data: bytes) -> EngineConfig:
    """What encode_engine_config wrote. Raises msgspec.ValidationError."""
    return msgspec.json.decode(data, type=EngineConfig, dec_hook=_decode_path)


def _decode_path(kind: type, value: Any) -> Any:
    return kind(value)
