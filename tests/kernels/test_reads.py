"""How kernels read: 16 bytes at a time, or an adapter's bytes and a context's take several times as long; and early.

Triton does so where it can show that neighbours lie on 16 bytes, and says nothing where it cannot: a remainder in an
address is enough. So what it compiles for an H100 is looked at; none is needed.
"""

import os
import re

import pytest
import torch

from flora.kernels import Context
from tests.kernels.absent_gpu import launch_lora, pretend_h100

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

FP8 = torch.float8_e4m3fn
META = torch.device("meta")
TWO_BYTES = re.compile(r"ld\.global[^;]*\.b16")
SIXTEEN_BYTES = re.compile(r"ld\.global[^;]*\.v4\.b32|cp\.async\.cg[^;]*, 0x10,")


def launch_attention(*, decodes: bool) -> None:
    """256 sequences of the Llama-3-8B shape."""
    from flora.kernels.triton_ops import TritonOps

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.int32, device=META)

    q = torch.empty(512, 32, 128, dtype=torch.bfloat16, device=META)
    kv = torch.empty(64, 2, 16, 8, 128, dtype=torch.bfloat16, device=META)
    context = Context(ints(256, 128), ints(256), ints(257), max_queries=1 if decodes else 512)
    TritonOps(132, overlap=True).paged_attention(q, kv, context, 0.1)


@pytest.fixture
def compiled(monkeypatch):
    """Compiles what a function launches, and returns the PTX of each kernel by its name."""
    pytest.importorskip("triton")
    from triton import knobs

    from flora.kernels.decode_attention import _decode_attention_kernel
    from flora.kernels.lora_expand import _lora_expand_kernel
    from flora.kernels.lora_shrink import _lora_shrink_kernel
    from flora.kernels.prefill_attention import _prefill_kernel

    pretend_h100(monkeypatch)
    touched = {_lora_shrink_kernel, _lora_expand_kernel, _decode_attention_kernel, _prefill_kernel}

    def forget() -> None:
        for kernel in touched:
            kernel.device_caches.clear()  # what a process has compiled, it launches

    def compile_all(launch):
        missing = []
        with monkeypatch.context() as hooked:
            hooked.setattr(knobs.runtime, "jit_cache_hook", lambda **found: missing.append(found) or True)
            launch()
        touched.update(found["fn"].jit_function for found in missing)
        done = [found["fn"].jit_function.preload(found["compile"]["specialization_data"]) for found in missing]
        return {kernel.name: kernel.asm["ptx"] for kernel in done}

    forget()
    yield compile_all
    forget()


@pytest.mark.parametrize(
    ("launch", "names"),
    [
        (lambda: launch_lora(0, 256), {"_lora_shrink_kernel", "_lora_expand_kernel"}),
        (lambda: launch_lora(0, 260, block_rows=64), {"_lora_shrink_kernel", "_lora_expand_kernel"}),
        (lambda: launch_lora(0, 256, factors=FP8), {"_lora_shrink_kernel", "_lora_expand_kernel"}),
        (lambda: launch_lora(0, 260, block_rows=64, factors=FP8), {"_lora_shrink_kernel", "_lora_expand_kernel"}),
        (lambda: launch_attention(decodes=True), {"_decode_attention_kernel"}),
        (lambda: launch_attention(decodes=False), {"_decode_attention_kernel", "_prefill_kernel"}),
    ],
    ids=[
        "adapters of decoding rows",
        "adapters of prompts",
        "adapters in fp8 of decoding rows",
        "adapters in fp8 of prompts",
        "contexts of decoding rows",
        "contexts of prompts",
    ],
)
def test_whatever_is_large_is_read_16_bytes_at_a_time(compiled, launch, names):
    kernels = compiled(launch)

    assert names <= kernels.keys()
    for name in names:
        assert not TWO_BYTES.findall(kernels[name]), name
        assert SIXTEEN_BYTES.findall(kernels[name]), name


@pytest.mark.parametrize("factors", [torch.bfloat16, FP8], ids=str)
def test_expand_asks_for_its_first_weights_before_it_waits_for_shrink(compiled, factors):
    """A wait in front of the loop would hold them up: a twentieth of what distinct adapters take (ADR 0016)."""
    expand = compiled(lambda: launch_lora(0, 256, factors=factors))["_lora_expand_kernel"]

    in_turn = re.findall(r"cp\.async\.cg|griddepcontrol\.wait", expand)

    assert in_turn[0] == "cp.async.cg"
    assert "griddepcontrol.wait" in in_turn
