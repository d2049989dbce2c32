"""Before a first step all its kernels are compiled at once; here for an H100 that is not there."""

import os
import threading

import pytest
import torch

from tests.kernels.absent_gpu import launch_lora, pretend_h100

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

CPU = torch.device("cpu")


@pytest.fixture
def launches(monkeypatch, tmp_path):
    """What was launched: Triton compiles for an H100, from nothing, and a launch is written down."""
    pytest.importorskip("triton")
    from triton.compiler import CompiledKernel

    from flora.kernels.lora_expand import _lora_expand_kernel
    from flora.kernels.lora_shrink import _lora_shrink_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launched: list[str] = []

    def load(kernel: CompiledKernel) -> None:
        kernel._run = lambda *_: launched.append(kernel.name)

    monkeypatch.setattr(CompiledKernel, "_init_handles", load)
    pretend_h100(monkeypatch)
    kernels = (_lora_shrink_kernel, _lora_expand_kernel)
    for kernel in kernels:
        kernel.device_caches.clear()
    yield launched
    for kernel in kernels:
        kernel.device_caches.clear()


def launch() -> None:
    for capacity in (1, 16, 256):
        launch_lora(layer=3, capacity=capacity)


def test_kernels_are_compiled_once_each_and_then_found(launches):
    from flora.kernels.compiling import compile_kernels

    assert compile_kernels(launch, CPU) == 4  # shrink and expand, for one stream and for many rows
    assert launches == []
    assert compile_kernels(launch, CPU) == 0
    assert launches == ["_lora_shrink_kernel", "_lora_expand_kernel"] * 3


def test_several_are_compiled_at_a_time(launches, monkeypatch):
    from triton.runtime.jit import JITFunction

    from flora.kernels.compiling import compile_kernels

    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)))
    together = threading.Barrier(4, timeout=60)
    monkeypatch.setattr(JITFunction, "preload", lambda self, data: together.wait())

    assert compile_kernels(launch, CPU) == 4


def test_what_fails_beside_others_is_compiled_alone(launches, monkeypatch):
    from triton.runtime.jit import JITFunction

    from flora.kernels.compiling import compile_kernels

    preload = JITFunction.preload

    def fail_in_threads(self, data):
        if threading.current_thread() is not threading.main_thread():
            raise SystemError("AST constructor recursion depth mismatch")
        return preload(self, data)

    monkeypatch.setattr(JITFunction, "preload", fail_in_threads)

    assert compile_kernels(launch, CPU) == 4
    assert compile_kernels(launch, CPU) == 0


def test_a_kernel_that_does_not_compile_is_an_error_and_triton_is_left_as_it_was(launches, monkeypatch):
    from triton import knobs
    from triton.runtime.jit import JITFunction

    from flora.kernels.compiling import compile_kernels

    def fail(self, data):
        raise RuntimeError(f"cannot compile {self.fn.__name__}")

    monkeypatch.setattr(JITFunction, "preload", fail)

    with pytest.raises(RuntimeError, match="cannot compile _lora_shrink_kernel"):
        compile_kernels(launch, CPU)
    assert knobs.runtime.jit_cache_hook is None
