"""The steps of `flora demo`: train, fine-tune, extract, serve, ask, load while others stream, count.

Every number comes from doing the thing: the checkpoints are trained here and now, and the accuracies of base and
adapters are those of `flora serve`, asked over HTTP.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flora.cli.extraction import Outcome, Target, extract_one
from flora.cli.gates import MIN_ITEMS, TaskResult
from flora.cli.machine import num_cores
from flora.cli.output import note, percent
from flora.cli.progress import progress
from flora.cli.remote import Server
from flora.cli.server_process import running_server
from flora.cli.sizes import show_bytes
from flora.demo import (
    BASE_SKILLS,
    TASKS,
    Example,
    LlamaShape,
    Skill,
    TrainingProgress,
    exact_match,
    fine_tune,
    held_out,
    is_right,
    load_model,
    save_model,
    train_base,
)

BASE_NAME = "cipher-base"
MAX_TOKENS = 12  # an answer has seven tokens at most, its end included
_MAX_THREADS = 4  # matrices of 256 columns keep no more busy
_STREAMS = 24  # requests under way at once
_BACKGROUND_STREAMS = 4  # that go on until the last adapter is loaded
_ITEM_SEED = 20_000  # of the held-out words; another seed than any training's


@dataclass(frozen=True, slots=True)
class Findings:
    """What the demo saw."""

    results: list[TaskResult]
    hidden_size: int
    base_skills_accuracy: float  # of the base on what it was trained for
    tokens_during_load: int  # that other streams got while the last adapter was extracted, registered and loaded
    load_ms: float
    seconds: float


@dataclass(frozen=True, slots=True)
class _Asked:
    """One answered request."""

    model: str
    example: Example
    answer: str


@dataclass(slots=True)
class _Tally:
    """Tokens that streams got, counted from many threads."""

    tokens: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self) -> None:
        with self._lock:
            self.tokens += 1


def demonstrate(folder: Path, *, seed: int, energy: float) -> Findings:
    """Runs the whole of it in `folder`, which is empty. Raises what its parts raise."""
    import torch

    torch.set_num_threads(min(num_cores(), _MAX_THREADS))
    started_s = time.monotonic()
    shape = LlamaShape()
    items = {task.name: held_out(task, MIN_ITEMS, _ITEM_SEED) for task in TASKS}
    skills_accuracy = _make_base(folder, shape, seed)
    tuned = {task.name: _make_tuned(folder, shape, task, items[task.name], seed) for task in TASKS}
    *early, late = TASKS
    outcomes = {task.name: _extract(folder, task, energy, seed) for task in early}
    asked: list[_Asked] = []
    tally = _Tally()
    arguments = ["--registry", str(folder / "registry"), "--device", "cpu", "--pool", "256MiB", "--host-cache", "64MiB"]
    _step("flora serve " + " ".join(arguments))
    with running_server(arguments, folder / "home") as url, Server(url) as server:
        note(f"  serves {BASE_NAME} and what the registry holds at {url}")
        with _asking(server, early, items, tally) as collect:
            with _streaming_meanwhile(server, early, items, tally):
                before = tally.tokens
                outcomes[late.name] = _extract(folder, late, energy, seed)
                load_ms = float(server.load(late.name)["load_ms"])
                during = tally.tokens - before
            note(f"  loaded {late.name} in {load_ms:.1f} ms; meanwhile the other streams got {during} tokens")
            asked += _ask_all(server, _requests([late], items), tally)
            asked += collect()
    results = [_result(task, tuned[task.name], outcomes[task.name], asked) for task in TASKS]
    return Findings(results, shape.hidden_size, skills_accuracy, during, load_ms, time.monotonic() - started_s)


def _make_base(folder: Path, shape: LlamaShape, seed: int) -> float:
    """Trains and writes the base; its accuracy on the skills that it was trained for."""
    _step(f"train a base model: Llama, hidden size {shape.hidden_size}, {shape.num_layers} layers")
    with _training("training the base") as tell:
        model = train_base(shape, seed=seed, progress=tell)
    save_model(model, folder / BASE_NAME)
    model = load_model(folder / BASE_NAME, shape)  # as stored, in bf16
    accuracies = [exact_match(model, held_out(skill, MIN_ITEMS, _ITEM_SEED)) for skill in BASE_SKILLS]
    mean = sum(accuracies) / len(accuracies)
    note(f"  {', '.join(skill.name for skill in BASE_SKILLS)}: {percent(mean)} right on words it never saw")
    return mean


def _make_tuned(folder: Path, shape: LlamaShape, task: Skill, items: Sequence[Example], seed: int) -> float:
    """Fine-tunes all weights on the task and writes the checkpoint; its accuracy on the held-out items."""
    _step(f"fine-tune all weights on {task.name}: {task.meaning}, as in {items[0].prompt}{items[0].answer}")
    model = load_model(folder / BASE_NAME, shape)
    with _training(f"fine-tuning {task.name}") as tell:
        fine_tune(model, task, seed=seed + 1, progress=tell)
    save_model(model, folder / task.name)
    accuracy = exact_match(load_model(folder / task.name, shape), items)
    note(f"  the checkpoint answers {percent(accuracy)} of {len(items)} held-out items")
    return accuracy


def _extract(folder: Path, task: Skill, energy: float, seed: int) -> Outcome:
    from flora.extract import ExtractConfig
    from flora.rank import RankRule

    base, tuned = folder / BASE_NAME, folder / task.name
    _step(f"flora extract {base} {tuned} --energy {energy}")
    config = ExtractConfig(rule=RankRule(energy=energy), seed=seed, cache_dir=folder / "home" / "cache" / "hashes")
    target = Target(source=str(tuned), name=task.name, out=None)
    outcome = extract_one(str(base), target, config, str(folder / "registry"), is_quiet=True)
    assert outcome.adapter.report is not None
    note(
        f"  {outcome.id}: ranks up to {outcome.adapter.header.max_rank}, {show_bytes(outcome.adapter_bytes)}, "
        f"{percent(outcome.adapter.report.kept_share)} of the whole change kept"
    )
    return outcome


def _requests(tasks: Sequence[Skill], items: dict[str, list[Example]]) -> list[tuple[str, Example]]:
    """(model, example): every item once to the base and once to its adapter, well mixed."""
    requests = [(model, item) for task in tasks for item in items[task.name] for model in (BASE_NAME, task.name)]
    random.Random(0).shuffle(requests)
    return requests


@contextmanager
def _asking(
    server: Server, tasks: Sequence[Skill], items: dict[str, list[Example]], tally: _Tally
) -> Iterator[Callable[[], list[_Asked]]]:
    """Sends the tasks' requests in the background; gives the function that waits for their answers."""
    requests = _requests(tasks, items)
    _step(f"one mixed batch of {len(requests)} streaming requests, base and adapters together")
    with ThreadPoolExecutor(1) as background:
        future = background.submit(_ask_all, server, requests, tally)
        yield future.result


@contextmanager
def _streaming_meanwhile(
    server: Server, tasks: Sequence[Skill], items: dict[str, list[Example]], tally: _Tally
) -> Iterator[None]:
    """A few streams that begin anew until the block ends, so that something always streams meanwhile."""
    ended = threading.Event()

    def keep_asking(task: Skill) -> None:
        for example in items[task.name]:
            if ended.is_set():
                return
            _ask(server, task.name, example, tally)

    with ThreadPoolExecutor(_BACKGROUND_STREAMS) as threads:
        futures = [threads.submit(keep_asking, tasks[i % len(tasks)]) for i in range(_BACKGROUND_STREAMS)]
        try:
            yield
        finally:
            ended.set()
    for future in futures:
        future.result()


def _ask_all(server: Server, requests: Sequence[tuple[str, Example]], tally: _Tally) -> list[_Asked]:
    with ThreadPoolExecutor(_STREAMS) as threads:
        return list(threads.map(lambda request: _ask(server, request[0], request[1], tally), requests))


def _ask(server: Server, model: str, example: Example, tally: _Tally) -> _Asked:
    answer = ""
    for piece in server.complete(model, example.prompt, max_tokens=MAX_TOKENS, temperature=0):
        answer += piece.text
        if piece.text:
            tally.add()
    return _Asked(model, example, answer)


def _result(task: Skill, tuned_accuracy: float, outcome: Outcome, asked: Sequence[_Asked]) -> TaskResult:
    header, report = outcome.adapter.header, outcome.adapter.report
    assert report is not None
    prefix = f"{task.name}:"
    mine = [one for one in asked if one.example.prompt.startswith(prefix)]
    return TaskResult(
        task=task.name,
        num_items=len({one.example.prompt for one in mine}),
        base_accuracy=_accuracy([one for one in mine if one.model == BASE_NAME]),
        tuned_accuracy=tuned_accuracy,
        served_accuracy=_accuracy([one for one in mine if one.model == task.name]),
        max_rank=header.max_rank,
        max_rank_share=max(module.rank / min(module.in_features, module.out_features) for module in header.modules),
        kept_share_of_modules=report.extracted_share,
        kept_share=report.kept_share,
        checkpoint_bytes=outcome.tuned_bytes,
        adapter_bytes=outcome.adapter_bytes,
    )


def _accuracy(asked: Sequence[_Asked]) -> float:
    return sum(is_right(one.answer, one.example) for one in asked) / len(asked)


@contextmanager
def _training(title: str) -> Iterator[Callable[[TrainingProgress], None]]:
    with progress(title) as report:
        yield lambda done: report(done.step / done.steps, f"step {done.step}/{done.steps}, loss {done.loss:.3f}")


def _step(what: str) -> None:
    note(f"-> {what}")
