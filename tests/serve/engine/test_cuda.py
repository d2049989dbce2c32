"""The engine on a GPU: captured graphs and overlapped steps tell what transformers with PEFT would."""

import random
import sys
from dataclasses import dataclass, replace

import pytest
import torch

from flora.adapter import Adapter
from flora.serve.engine import Engine
from flora.serve.engine.schedule.residency import Resident
from flora.serve.messages import LoadAdapter
from flora.serve.request import AdapterTarget, SamplingParams
from tests.serve.engine.adapters import random_adapter, rounded_to_fp8, with_peft
from tests.serve.engine.bases import VOCAB, load_judge
from tests.serve.engine.worlds import GREEDY, World, ask, run_to_end

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU = {"device": "cuda", "max_sequences": 24, "max_batch_tokens": 64, "poison": True}
CROWD = {  # nothing remembered and nobody preferred: two runs of equal lengths then have equal steps
    "max_sequences": 256,
    "max_batch_tokens": 512,
    "pool_bytes": 512 << 20,
    "prefix_cache": False,
    "fairness": False,
}
FP8 = {"adapter_dtype": "float8_e4m3fn"}
FAMILIES = ("llama", "qwen2", "qwen3", "smollm2-135m", "qwen2.5-0.5b")


def prompt_of(num_tokens: int, seed: int) -> list[int]:
    seeded = random.Random(seed)
    return [seeded.randrange(VOCAB) for _ in range(num_tokens)]


def judged_answer(world: World, adapter: Adapter | None, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens of transformers, with PEFT where there is an adapter, in float32 on the CPU."""
    judge = load_judge(world.base)
    judge = with_peft(judge, adapter) if adapter else judge
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(num_tokens):
            tokens.append(int(judge(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(("loaders", "beside_rows"), [(0, 0), (2, 0), (0, 48), (0, 4096)])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers_and_peft(bases, tmp_path, family, loaders, beside_rows):
    """More rows with adapters of their own than any graph was captured with; a different rank in every module."""
    world = World(bases(family), tmp_path)
    ranks = (1, 3, 4, 8, 64, 128)
    adapters: dict[str, Adapter | None] = {"base": None}
    adapters |= {f"adapter{seed}": random_adapter(world.config, seed, ranks=ranks) for seed in range(8)}
    targets = {name: world.add(adapter, name) if adapter else None for name, adapter in adapters.items()}
    engine = world.engine(**GPU, num_loaders=loaders, host_cache_bytes=64 << 20, beside_rows=beside_rows)
    prompts = {(name, n): prompt_of(n, seed=n) for name in adapters for n in (1, 17, 70)}

    for (name, n), prompt in prompts.items():
        ask(engine, f"{name}/{n}", prompt, targets[name], SamplingParams(max_tokens=10, temperature=0.0))
    answers = run_to_end(engine)

    for (name, n), prompt in prompts.items():
        assert answers[f"{name}/{n}"].tokens == judged_answer(world, adapters[name], prompt, 10), (name, n)
    assert engine.pages.num_free + sum(len(resident.pages) for resident in engine.residency) == engine.pages.num_usable
    engine.close()


@pytest.mark.parametrize(("loaders", "beside_rows"), [(0, 0), (2, 4096)])
@pytest.mark.parametrize("family", ["llama", "qwen2.5-0.5b"])
def test_adapters_in_fp8_answer_as_peft_with_the_rounded_factors(bases, tmp_path, family, loaders, beside_rows):
    world = World(bases(family), tmp_path)
    adapters = {f"adapter{seed}": random_adapter(world.config, seed, ranks=(1, 3, 8, 64, 128)) for seed in range(5)}
    targets = {name: world.add(adapter, name) for name, adapter in adapters.items()}
    engine = world.engine(**GPU, **FP8, num_loaders=loaders, host_cache_bytes=64 << 20, beside_rows=beside_rows)
    prompts = {(name, n): prompt_of(n, seed=n) for name in adapters for n in (1, 17, 70)}

    for (name, n), prompt in prompts.items():
        ask(engine, f"{name}/{n}", prompt, targets[name], SamplingParams(max_tokens=10, temperature=0.0))
    answers = run_to_end(engine)

    for (name, n), prompt in prompts.items():
        judged = judged_answer(world, rounded_to_fp8(adapters[name]), prompt, 10)
        assert answers[f"{name}/{n}"].tokens == judged, (name, n)
    engine.close()


def test_an_adapter_that_comes_back_to_other_pages_answers_as_before(bases, tmp_path):
    world = World(bases("llama"), tmp_path)
    adapter = random_adapter(world.config, 1)
    target, other = world.add(adapter, "it"), world.add(random_adapter(world.config, 2), "other")
    engine = world.engine(**GPU)
    prompt = prompt_of(20, seed=0)
    expected = judged_answer(world, adapter, prompt, 12)

    def answer(request_id: str) -> list[int]:
        ask(engine, request_id, prompt, target)
        return run_to_end(engine)[request_id].tokens

    first, before = answer("first"), place(engine, target).pages
    engine.residency.remove(target.serving_digest)
    ask(engine, "between", prompt, other)
    run_to_end(engine)
    again, after = answer("again"), place(engine, target).pages

    assert before != after
    assert first == again == expected
    engine.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_one_stream_alone_answers_as_transformers_and_peft_do(bases, tmp_path, family):
    """Steps of one row have products of their own."""
    world = World(bases(family), tmp_path)
    adapter = random_adapter(world.config, 3, ranks=(4, 64))
    target, prompt = world.add(adapter, "it"), prompt_of(12, seed=5)
    engine = world.engine(**GPU, beside_rows=256)

    for name, whose in (("base", None), ("adapter", target)):
        ask(engine, name, prompt, whose, SamplingParams(max_tokens=10, temperature=0.0))
        wanted = judged_answer(world, adapter if whose else None, prompt, 10)
        assert run_to_end(engine)[name].tokens == wanted, name
    engine.close()


def test_a_step_waits_for_no_adapter_that_it_does_not_use(bases, tmp_path):
    """The bus is held up for a second or two: what needs nothing of it goes on, and what does, waits."""
    world = World(bases("llama"), tmp_path)
    slow_adapter = random_adapter(world.config, 1)
    slow = world.add(slow_adapter, "slow")
    engine = world.engine(**GPU)
    prompt = prompt_of(20, seed=0)
    for name, whose in (("first", None), ("second", world.add(random_adapter(world.config, 2), "other"))):
        ask(engine, name, prompt, whose)
    run_to_end(engine)  # CUDA loads a kernel when it is first launched, and waits for whatever runs then
    passed = hold_up_the_bus(engine, num_cycles=3_000_000_000)

    load(engine, slow)
    ask(engine, "base", prompt, None, SamplingParams(max_tokens=8, temperature=0.0))
    base = run_to_end(engine)["base"].tokens
    assert not passed.query(), "the base's request waited for the bus"
    ask(engine, "slow", prompt, slow, SamplingParams(max_tokens=8, temperature=0.0))
    adapted = run_to_end(engine)["slow"].tokens

    assert passed.query()
    assert base == judged_answer(world, None, prompt, 8)
    assert adapted == judged_answer(world, slow_adapter, prompt, 8)
    engine.close()


def test_pages_of_an_adapter_that_leaves_while_it_arrives_are_not_written_to_any_more(bases, tmp_path):
    world = World(bases("llama"), tmp_path)
    adapter = random_adapter(world.config, 1)
    target = world.add(adapter, "it")
    engine = world.engine(**GPU)
    passed = hold_up_the_bus(engine, num_cycles=1_000_000_000)

    load(engine, target)
    engine.residency.remove(target.serving_digest)
    pool_filling = prompt_of(200, seed=1)
    ask(engine, "base", pool_filling, None, SamplingParams(max_tokens=8, temperature=0.0))
    base = run_to_end(engine)["base"].tokens
    assert passed.query(), "the pages were given to another before the copy into them was done"
    ask(engine, "again", pool_filling, target, SamplingParams(max_tokens=8, temperature=0.0))

    assert run_to_end(engine)["again"].tokens == judged_answer(world, adapter, pool_filling, 8)
    assert base == judged_answer(world, None, pool_filling, 8)
    engine.close()


def test_an_adapter_that_still_arrives_when_the_table_of_cells_is_widened_answers_as_ever(bases, tmp_path, monkeypatch):
    monkeypatch.setattr("flora.serve.engine.build._MAX_CELLS", 32)
    world = World(bases("llama"), tmp_path)
    adapters = {rank: random_adapter(world.config, rank, ranks=[rank], absent=0.0) for rank in (4, 64)}
    targets = {rank: world.add(adapter, f"rank{rank}") for rank, adapter in adapters.items()}
    engine = world.engine(**GPU)
    hold_up_the_bus(engine, num_cycles=1_000_000_000)

    for target in targets.values():
        load(engine, target)
    sizes = [len(engine.host.get(target.serving_digest).cells) for target in targets.values()]
    assert sizes[0] <= 32 < sizes[1]

    prompt = prompt_of(20, seed=0)
    for rank, target in targets.items():
        ask(engine, str(rank), prompt, target, SamplingParams(max_tokens=8, temperature=0.0))
    answers = run_to_end(engine)
    for rank, adapter in adapters.items():
        assert answers[str(rank)].tokens == judged_answer(world, adapter, prompt, 8), rank
    engine.close()


def hold_up_the_bus(engine: Engine, num_cycles: int) -> torch.cuda.Event:
    """For so long no adapter comes over it; the event says when it is free again."""
    bus, passed = engine.runner._copies._over_bus, torch.cuda.Event()
    with torch.cuda.stream(bus):
        torch.cuda._sleep(num_cycles)
        passed.record(bus)
    return passed


def load(engine: Engine, target: AdapterTarget) -> None:
    """It has pages, and is on its way there, when this returns."""
    engine.load_adapter(LoadAdapter(request_id="load", adapter=target))
    while engine.residency.get(target.serving_digest) is None:
        engine.step(wait_s=1.0)


def place(engine: Engine, target: AdapterTarget) -> Resident:
    resident = engine.residency.get(target.serving_digest)
    assert resident is not None
    return resident


@dataclass(frozen=True)
class Trial:
    """One watched request among others."""

    watched: AdapterTarget | None
    prompt: list[int]
    line: int  # how many neighbours come before it
    neighbours: list[AdapterTarget | None]
    lengths: list[int]  # of the neighbours' prompts
    max_tokens: list[int]

    def run(self, engine: Engine, name: str, adapters: list[AdapterTarget | None]) -> list:
        """All that was told of the watched request, every logit among it, beside neighbours of these adapters."""
        everything = SamplingParams(max_tokens=6, temperature=0.0, logprobs=VOCAB)
        for i, adapter in enumerate(adapters):
            if i == self.line:
                ask(engine, f"{name}/watched", self.prompt, self.watched, everything)
            sampling = SamplingParams(max_tokens=self.max_tokens[i], temperature=0.0, ignore_eos=True)
            ask(engine, f"{name}/{i}", prompt_of(self.lengths[i], seed=i), adapter, sampling)
        return [(event.token_ids, event.logprobs) for event in run_to_end(engine)[f"{name}/watched"].events]


def draw_trial(number: int, targets: list[AdapterTarget], broken: list[AdapterTarget]) -> Trial:
    seeded = random.Random(number)
    count = seeded.randrange(1, 256)
    neighbours = [seeded.choice([None, *targets, *targets, *broken]) for _ in range(count)]
    lengths = [seeded.choice([1, 1, 1, seeded.randrange(2, 60)]) for _ in range(count)]
    # A broken neighbour is found out when its second row is under way: so long it stays in the run without it, too.
    max_tokens = [2 if neighbours[i] in broken else seeded.randrange(1, 8) for i in range(count)]
    prompt = prompt_of(seeded.randrange(1, 40), seed=number)
    return Trial(seeded.choice([None, *targets]), prompt, seeded.randrange(count), neighbours, lengths, max_tokens)


@pytest.mark.parametrize(
    ("dtype", "beside_rows", "more"),
    [("float32", 0, {}), ("bfloat16", 0, {}), ("bfloat16", 512, {}), ("bfloat16", 512, FP8)],
)
@pytest.mark.parametrize("family", ["llama", "qwen2.5-0.5b"])
def test_neighbours_never_matter_in_a_padded_batch_of_one_shape(bases, tmp_path, family, dtype, beside_rows, more):
    """100 trials each: every logit of one request, beside 1 to 255 neighbours of the base alone, and again beside as
    many of any adapters, its own and some full of NaN among them. The two runs have the same steps of the same shapes.
    """
    world = World(bases(family), tmp_path)
    engine = world.engine(device="cuda", dtype=dtype, beside_rows=beside_rows, **CROWD, **more)
    ranks = (1, 3, 4, 8, 64, 128)
    targets = [world.add(random_adapter(world.config, seed, ranks=ranks), f"a{seed}") for seed in range(8)]
    broken = [world.add(random_adapter(world.config, seed, ranks=ranks), f"broken{seed}") for seed in (8, 9)]
    for target in (*targets, *broken):
        ask(engine, target.label, [1], target)
    run_to_end(engine)
    for target in broken:
        engine.runner.pool.poison(place(engine, target).pages)

    for number in range(100):
        trial = draw_trial(number, targets, broken)

        plain = trial.run(engine, f"plain{number}", [None] * len(trial.neighbours))
        mixed = trial.run(engine, f"mixed{number}", trial.neighbours)

        assert plain == mixed, f"trial {number}: {len(trial.neighbours)} neighbours"
    engine.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2.5-0.5b"])
def test_batch_invariant_a_request_has_the_same_bits_alone_and_in_any_crowd(bases, tmp_path, family, dtype):
    """20 trials each: every logit of one request, alone and beside 1 to 255 neighbours, in other steps and chunks."""
    world = World(bases(family), tmp_path)
    engine = world.engine(device="cuda", dtype=dtype, batch_invariant=True, **CROWD)
    targets = [world.add(random_adapter(world.config, seed, ranks=(1, 8, 64)), f"a{seed}") for seed in range(4)]

    for number in range(20):
        trial = draw_trial(number, targets, [])
        alone = replace(trial, line=0, neighbours=[None], lengths=[1], max_tokens=[1])

        assert trial.run(engine, f"crowd{number}", trial.neighbours) == alone.run(engine, f"alone{number}", [None])
    engine.close()


def test_a_seeded_draw_is_the_same_alone_and_in_company(bases, tmp_path):
    world = World(bases("llama"), tmp_path)
    engine = world.engine(**GPU)
    drawn = SamplingParams(max_tokens=10, temperature=0.9, top_p=0.8, top_k=50, seed=3)
    prompt = prompt_of(9, seed=1)

    ask(engine, "alone", prompt, None, drawn)
    alone = run_to_end(engine)["alone"].tokens
    for i in range(12):
        ask(engine, f"n{i}", prompt_of(i + 1, seed=i), None, SamplingParams(max_tokens=10, temperature=1.3, seed=i))
    ask(engine, "company", prompt, None, drawn)

    assert run_to_end(engine)["company"].tokens == alone
    engine.close()


def test_no_launch_waits_for_the_device_whatever_is_asked_of_a_token(bases, tmp_path, monkeypatch):
    engine = World(bases("llama"), tmp_path).engine(**GPU)
    launch, num_launched = engine.runner.launch, 0

    def watched(chunks, slots):
        nonlocal num_launched
        num_launched += 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(chunks, slots)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(engine.runner, "launch", watched)
    asked = [
        {},
        {"temperature": 0.7},
        {"top_p": 0.5},
        {"top_k": 3},
        {"logprobs": 4},
        {"temperature": 0.0, "logprobs": 0},
    ]
    for i, fields in enumerate(asked):
        ask(engine, str(i), prompt_of(5 + i, seed=i), None, SamplingParams(**{"max_tokens": 8, "seed": i} | fields))

    answers = run_to_end(engine)

    assert num_launched >= 8
    assert [len(answers[str(i)].tokens) for i in range(len(asked))] == [8] * len(asked)
    engine.close()


def test_every_kernel_of_a_start_and_of_the_steps_after_it_is_compiled_ahead(bases, tmp_path, monkeypatch):
    from triton import knobs

    from flora.serve.engine.cuda import runner

    compile_kernels, late = runner.compile_kernels, []

    def watched(launch, device):
        count = compile_kernels(launch, device)
        assert count > 10
        monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda *, fn, **_: late.append(fn.name))
        return count

    forget_compiled_kernels()
    monkeypatch.setattr(runner, "compile_kernels", watched)
    world = World(bases("llama"), tmp_path)
    target = world.add(random_adapter(world.config, 1, ranks=(4, 64)), "it")
    engine = world.engine(**GPU, beside_rows=16)
    drawn = SamplingParams(max_tokens=6, temperature=0.8, top_p=0.9, top_k=20, logprobs=2)
    for number in range(24):
        sampling = drawn if number % 3 else GREEDY
        ask(engine, str(number), prompt_of(1 + 3 * number, seed=number), target if number % 2 else None, sampling)
    run_to_end(engine)

    assert late == []
    engine.close()


def forget_compiled_kernels() -> None:
    """This process compiles all of Flora's anew, or finds them on the disk."""
    from triton.runtime.jit import JITFunction

    for name, module in list(sys.modules.items()):
        if name.startswith("flora.kernels."):
            for kernel in vars(module).values():
                if isinstance(kernel, JITFunction):
                    kernel.device_caches.clear()
