"""Which kernels a step launches, and how often: by name, through the whole engine.

In the interpreter the launches themselves are counted; on a GPU the profiler counts what ran, graphs included.
"""

import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import flora.kernels
from flora.kernels.triton_ops import TritonOps
from flora.serve.engine import Engine, build
from flora.serve.request import SamplingParams
from tests.kernels.on_triton.conftest import ON_GPU
from tests.serve.engine.adapters import random_adapter
from tests.serve.engine.bases import make_base
from tests.serve.engine.worlds import World, ask, run_to_end

LAYERS = 2
BASE = {"_norm_kernel": 2 * LAYERS + 1, "_rope_store_kernel": LAYERS, "_silu_mul_kernel": LAYERS}
DECODE = {"_decode_attention_kernel": LAYERS, "_decode_parts_kernel": 1}  # parts: once for all layers
PREFILL = {"_prefill_kernel": LAYERS}
LORA = {"_lora_shrink_kernel": 4 * LAYERS, "_lora_expand_kernel": 4 * LAYERS}  # qkv, out, gate and up, down
PROMPT = [3, 1, 4]
SHORT = SamplingParams(max_tokens=3, temperature=0.0)


class Counted:
    """A kernel that notes its launches."""

    def __init__(self, kernel: Any, note: Callable[[], None]) -> None:
        self._kernel = kernel
        self._note = note

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> Any:
            self._note()
            return self._kernel[grid](*arguments, **options)

        return launch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("launches")
    return World(make_base("llama", folder / "base"), folder)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Launches since it was last cleared, by kernel."""
    seen: Counter[str] = Counter()
    for info in pkgutil.iter_modules(flora.kernels.__path__):
        module = importlib.import_module(f"flora.kernels.{info.name}")
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel") and hasattr(kernel, "__getitem__"):
                monkeypatch.setattr(module, name, Counted(kernel, lambda name=name: seen.update([name])))  # type: ignore[misc]
    return seen


@pytest.fixture
def engine(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """A CPU's engine that runs the GPU's kernels in the interpreter."""
    monkeypatch.setattr(build, "choose_ops", lambda device, batch_invariant: TritonOps(num_sms=2))
    engine = world.engine(max_batch_tokens=16, max_sequences=4)
    yield engine
    engine.close()


def step(engine: Engine, launches: Counter[str]) -> dict[str, int]:
    """What one step launched that had rows."""
    launches.clear()
    engine.step(wait_s=10.0)
    return dict(launches)


@pytest.mark.skipif(ON_GPU, reason="on the GPU the profiler counts")
def test_a_step_launches_what_its_rows_need_and_nothing_else(world, engine, launches):
    target = world.add(random_adapter(world.config, seed=1, ranks=(4,), absent=0.0), "a")
    assert set(engine.ready.kernels.values()) == {"triton"}

    ask(engine, "base", PROMPT, sampling=SamplingParams(max_tokens=8, temperature=0.0))
    assert step(engine, launches) == BASE | DECODE | PREFILL
    assert step(engine, launches) == BASE | DECODE  # a row that decodes

    ask(engine, "adapter", PROMPT, target, SHORT)
    while not engine.heartbeat().resident:  # the base's rows decode while the adapter is loaded
        launched = step(engine, launches)
    assert launched == BASE | DECODE | PREFILL | LORA
    assert step(engine, launches) == BASE | DECODE | LORA

    answers = run_to_end(engine)
    assert {answer.finish_reason for answer in answers.values()} == {"length"}
    assert step(engine, launches) == {}  # nothing to do


def profiled(engine: Engine) -> dict[str, int]:
    """What one step launched, as the device tells."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        engine.step()
        torch.cuda.synchronize()
    kernels = (*BASE, *DECODE, *PREFILL, *LORA)
    return dict(Counter(kernel for event in profile.events() for kernel in kernels if event.name.startswith(kernel)))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_a_replayed_step_runs_the_kernels_that_rows_name(world):
    """A step as the profiler sees it: the kernels that a row of results stands for, each as often as planned."""
    engine = world.engine(device="cuda", dtype="bfloat16", max_sequences=24, max_batch_tokens=64, poison=False)
    target = world.add(random_adapter(world.config, seed=1, ranks=(4,), absent=0.0), "b")
    for name, adapter, expected in (("base", None, BASE | DECODE), ("adapter", target, BASE | DECODE | LORA)):
        ask(engine, name, PROMPT, adapter, SamplingParams(max_tokens=8, temperature=0.0))
        while len(engine.scheduler.running) == 0 or not any(s.num_generated for s in engine.scheduler.running):
            engine.step(wait_s=10.0)
        assert profiled(engine) == expected
        if adapter:  # a prompt beside it, in the same lists
            ask(engine, "prompt", PROMPT, adapter, SHORT)
            assert profiled(engine) == expected | PREFILL
        run_to_end(engine)
    engine.close()
