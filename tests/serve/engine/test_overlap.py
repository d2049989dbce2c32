"""Overlapped steps on a CPU: tokens are told one step late, as on a GPU, and nothing else is different."""

import random
from typing import Any

import msgspec
import pytest

from flora.serve.engine import Engine
from flora.serve.engine.runner import DoneStep
from flora.serve.engine.schedule.pages import Use
from flora.serve.engine.schedule.scheduler import Chunk
from flora.serve.engine.schedule.sequence import PENDING, Sequence
from flora.serve.messages import Cancel, UnloadAdapter
from flora.serve.request import SamplingParams
from tests.serve.engine.adapters import random_adapter
from tests.serve.engine.bases import VOCAB
from tests.serve.engine.test_isolation import prompt_of
from tests.serve.engine.worlds import GREEDY, World, ask, collect, run_to_end

EVERYTHING: dict[str, Any] = {"prefix_cache": True, "fairness": True, "cluster": 2}


class OverlappingRunner:
    """Tokens that a launched step draws are known to this device at once, and to the engine when it collects them."""

    overlaps = True

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._drawn: dict[tuple[Sequence, int], int] = {}
        self.failures = 0  # of the next launches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def launch(self, chunks: list[Chunk], slots: list[int | None]) -> DoneStep:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("no memory")
        pending = [(chunk, chunk.start) for chunk in chunks if chunk.sequence.tokens[chunk.start] == PENDING]
        for chunk, place in pending:
            chunk.sequence.tokens[place] = self._drawn[chunk.sequence, place]
        done = self._runner.run(chunks, slots)
        for chunk, place in pending:
            chunk.sequence.tokens[place] = PENDING
        for chunk, drawn in done:
            self._drawn[chunk.sequence, chunk.start + chunk.count] = 0 if drawn.token is None else drawn.token
        return DoneStep(done)


def overlapping(world: World, **settings: Any) -> Engine:
    engine = world.engine(**settings)
    engine.runner = OverlappingRunner(engine.runner)
    return engine


def held(engine: Engine) -> int:
    """Pages that are neither free, nor an adapter's, nor kept for later requests alone."""
    kept = engine.scheduler.prefixes.idle_pages
    return engine.pages.num_usable - engine.pages.num_free - engine.pages.count(Use.ADAPTER) - kept


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["plain", "everything on"])
def test_overlapped_steps_tell_the_same_tokens(world, settings):
    """In a pool so tight that running requests are preempted while their token is still being drawn."""
    targets = [None] + [world.add(random_adapter(world.config, seed, ranks=[2, 4]), f"a{seed}") for seed in (1, 2, 3)]
    roomy = world.engine()
    tight = overlapping(world, pool_bytes=34 * 8192, max_batch_tokens=40, max_sequences=12, max_adapters=2, **settings)
    seeded = random.Random(3)
    beginnings = [prompt_of(n, seed=n) for n in (5, 17, 33)]
    for i in range(60):
        prompt = seeded.choice(beginnings) + [seeded.randrange(VOCAB) for _ in range(seeded.randrange(1, 12))]
        sampling = SamplingParams(
            max_tokens=seeded.randrange(1, 60), temperature=seeded.choice([0.0, 0.8]), seed=i, stop_token_ids=(7,)
        )
        target = seeded.choice(targets)
        for engine in (roomy, tight):
            ask(engine, str(i), prompt, target, sampling)
    expected, answers = run_to_end(roomy), run_to_end(tight)

    assert tight.heartbeat().preemptions > 0
    assert (tight.heartbeat().prefix_hits > 0) == bool(settings)
    assert {answer.finish_reason for answer in answers.values()} == {"length", "stop"}
    for name, answer in answers.items():
        assert answer.tokens == expected[name].tokens
        assert answer.finish_reason == expected[name].finish_reason
    assert held(tight) == 0
    roomy.close()
    tight.close()


def test_cancels_failures_and_unloads_leave_nothing_held(world):
    """Whatever ends a request while its rows are under way, the pages come back, and the cache holds no wrong keys."""
    targets = [None] + [world.add(random_adapter(world.config, seed, ranks=[2, 4]), f"a{seed}") for seed in (1, 2)]
    engine = overlapping(world, pool_bytes=60 * 8192, max_batch_tokens=48, max_sequences=8, **EVERYTHING)
    plain = world.engine()
    seeded = random.Random(4)
    beginnings = [prompt_of(n, seed=n) for n in (20, 40)]
    answers: dict = {}
    asked = {}
    for i in range(150):
        prompt = seeded.choice(beginnings) + [seeded.randrange(VOCAB) for _ in range(seeded.randrange(1, 20))]
        asked[str(i)] = (
            prompt,
            seeded.choice(targets),
            msgspec.structs.replace(GREEDY, max_tokens=seeded.randrange(1, 20)),
        )
        ask(engine, str(i), *asked[str(i)])
        collect(engine.step(), answers)
        engine.runner.failures = int(seeded.random() < 0.05)
        if seeded.random() < 0.2:
            engine.cancel(Cancel(request_id=str(seeded.randrange(i + 1))))
        if seeded.random() < 0.1:
            digest = seeded.choice(targets[1:]).serving_digest
            engine.unload_adapter(UnloadAdapter(request_id="unload", serving_digest=digest))
    engine.runner.failures = 0
    for name, answer in run_to_end(engine).items():
        known = answers.setdefault(name, answer)
        if known is not answer:
            known.tokens += answer.tokens
            known.events += answer.events
    reasons = [answers[name].finish_reason for name in asked]
    for name, (prompt, target, sampling) in asked.items():
        ask(plain, name, prompt, target, sampling)
    expected = run_to_end(plain)

    assert set(reasons) == {"length", "cancelled", "error"}
    assert reasons.count("length") > 75
    for name in asked:
        assert answers[name].tokens == expected[name].tokens[: len(answers[name].tokens)]
    assert held(engine) == 0
    for resident in list(engine.residency):
        engine.unload_adapter(UnloadAdapter(request_id="u", serving_digest=resident.digest))
    engine.scheduler.prefixes.forget(None)
    assert engine.pages.num_free == engine.pages.num_usable
    engine.close()
    plain.close()
