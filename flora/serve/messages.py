"""What front ends and the engine say to each other: MessagePack over ZeroMQ, one tagged struct a message.

    front end ── Submit, Cancel, LoadAdapter, UnloadAdapter, Drain ──► engine
    front end ◄── Ready, StepEvents, Rejected, AdapterLoaded, AdapterUnloaded, Heartbeat ── engine

A front end is a DEALER with an identity of its own; the engine, a ROUTER, answers to the identity that asked. Request
ids are the front end's and unique within it.
"""

from typing import Literal

import msgspec

from flora.serve.request import AdapterTarget, SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "error"]


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    pass


class Submit(_Message, frozen=True, kw_only=True):
    request_id: str
    prompt: tuple[int, ...]  # token ids, at least one
    sampling: SamplingParams
    adapter: AdapterTarget | None = None  # None: the base


class Cancel(_Message, frozen=True, kw_only=True):
    request_id: str


class LoadAdapter(_Message, frozen=True, kw_only=True):
    """Make it resident now. Answered by AdapterLoaded, or Rejected with the same request_id."""

    request_id: str
    adapter: AdapterTarget
    pinned: bool = False


class UnloadAdapter(_Message, frozen=True, kw_only=True):
    """Give its pages back as soon as no sequence uses it. Answered by AdapterUnloaded."""

    request_id: str
    serving_digest: str


class Hello(_Message, frozen=True, kw_only=True):
    """A front end's first words; the engine answers Ready once it can serve."""


class Drain(_Message, frozen=True, kw_only=True):
    """Take no new request; end when the running ones are done."""


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log probability of the chosen token, and of the likeliest ones, best first."""

    chosen: float
    top_ids: tuple[int, ...] = ()
    top: tuple[float, ...] = ()


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True):
    """New tokens of one request. `finish_reason` ends it; the token that stopped it is not among `token_ids`."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    cached_tokens: int = 0
    error: str | None = None  # with finish_reason "error"


class StepEvents(_Message, frozen=True, kw_only=True):
    """All tokens that one step made for one front end, in one frame."""

    events: tuple[TokenEvent, ...]


class Rejected(_Message, frozen=True, kw_only=True):
    """The request never started, or its adapter could not be loaded. `code` is a FloraError's: FL-PAGES, FL-BASE, …"""

    request_id: str
    code: str
    message: str
    cause: str | None = None
    fix: str | None = None


class AdapterLoaded(_Message, frozen=True, kw_only=True):
    request_id: str
    serving_digest: str
    load_ms: float


class AdapterUnloaded(_Message, frozen=True, kw_only=True):
    request_id: str
    serving_digest: str
    was_resident: bool


class Ready(_Message, frozen=True, kw_only=True):
    """The engine's constants, once it can serve."""

    base_id: str
    max_context: int  # tokens of prompt and answer together
    vocab_size: int
    num_pages: int
    page_tokens: int
    page_bytes: int  # of one page id, all planes
    device: str
    dtype: str
    kernels: dict[str, str]  # op -> implementation that runs: {"paged_attention": "reference"}
    engine_pid: int
    merged: str | None = None  # serving digest of the adapter that is in the base's weights; it takes no other


class ResidentAdapter(msgspec.Struct, frozen=True, kw_only=True):
    serving_digest: str
    label: str
    num_pages: int
    rank: int
    running: int  # sequences that need it now
    pinned: bool


class Heartbeat(_Message, frozen=True, kw_only=True):
    """At least once a second: the engine lives, and this is its state. Counters are totals since start."""

    running: int
    waiting: int
    waiting_by_adapter: dict[str, int]  # serving digest -> requests waiting
    free_pages: int
    kv_pages: int
    adapter_pages: int
    prefix_pages: int = 0  # of kv_pages, those that only the prefix cache holds
    resident: tuple[ResidentAdapter, ...]
    host_cache_bytes: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    preemptions: int
    adapter_loads: int
    adapter_load_seconds: float
    adapter_evictions: int
    prefix_queries: int = 0  # prompt tokens that were looked for in the prefix cache
    prefix_hits: int = 0  # those found there
    prefix_evictions: int = 0  # pages
    aborts: int = 0  # requests refused because their first token would have come too late


FromFrontEnd = Submit | Cancel | LoadAdapter | UnloadAdapter | Hello | Drain
FromEngine = Ready | StepEvents | Rejected | AdapterLoaded | AdapterUnloaded | Heartbeat
