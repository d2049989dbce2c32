"""Kernels compiled side by side. Triton compiles one when it is first launched, in a second or two, and so a machine's
first start would wait for all of them one after another.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from triton import knobs


def compile_kernels(launch: Callable[[], object], device: torch.device) -> int:
    """Compiles what `launch` launches on `device` and this process has not compiled yet. Returns how many those were.

    launch  runs without these kernels, so it computes garbage; what it launches must not depend on that
    """
    missing: dict[tuple[str, str], Callable[[], object]] = {}

    def leave_out(*, key: str, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        missing[fn.name, key] = partial(fn.jit_function.preload, compile["specialization_data"])
        return True

    earlier_hook = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = leave_out
    try:
        launch()
    finally:
        knobs.runtime.jit_cache_hook = earlier_hook
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), initializer=_use, initargs=(device,)) as pool:
        tried = [(compile_one, pool.submit(compile_one)) for compile_one in missing.values()]
    for compile_one, outcome in tried:
        if outcome.exception():  # now and then ast.parse fails beside another thread's (python/cpython#106905)
            compile_one()
    return len(missing)


def _use(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a thread begins with the first
