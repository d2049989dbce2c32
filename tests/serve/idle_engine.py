"""What an engine says that has nothing to do."""

from flora.serve.messages import Heartbeat, Ready

READY = Ready(
    base_id="sha256:b",
    max_context=64,
    vocab_size=10,
    num_pages=8,
    page_tokens=16,
    page_bytes=1024,
    device="cpu",
    dtype="float32",
    kernels={},
    engine_pid=1,
)
BEAT = Heartbeat(
    running=0,
    waiting=0,
    waiting_by_adapter={},
    free_pages=8,
    kv_pages=0,
    adapter_pages=0,
    resident=(),
    host_cache_bytes=0,
    steps=0,
    prompt_tokens=0,
    generated_tokens=0,
    preemptions=0,
    adapter_loads=0,
    adapter_load_seconds=0.0,
    adapter_evictions=0,
)
