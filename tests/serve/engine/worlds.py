"""A base, a registry of adapters of it, and engines over them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flora.adapter import Adapter
from flora.checkpoint import open_checkpoint
from flora.registry import Registry
from flora.serve.config import EngineConfig
from flora.serve.engine import Engine, build_engine
from flora.serve.engine.loading.loader import Loader
from flora.serve.engine.model.config import ModelConfig, parse_model_config
from flora.serve.engine.schedule.pages import Use
from flora.serve.messages import FromEngine, Rejected, StepEvents, Submit, TokenEvent
from flora.serve.request import AdapterTarget, SamplingParams

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
PAGE_BYTES = 8192  # of the small Llama: 2 layers, 2 key heads of 16, 16 tokens, float32


@dataclass
class World:
    base: Path
    home: Path

    @property
    def config(self) -> ModelConfig:
        return parse_model_config(open_checkpoint(self.base).config)

    @property
    def registry(self) -> Registry:
        return Registry.open(self.home / "registry")

    def engine(self, loader: Loader | None = None, **settings: Any) -> Engine:
        """An engine over this world; freed pages are poisoned unless told otherwise."""
        defaults: dict[str, Any] = {
            "base": self.base,
            "registry": str(self.home / "registry"),
            "cache_dir": self.home / "cache",
            "pool_bytes": 48 << 20,
            "poison": True,
            "num_threads": 1,  # small models, and other tests beside them
            "prefix_cache": False,  # what a test asks twice is computed twice, unless it is about the cache
        }
        return build_engine(EngineConfig(**defaults | settings), loader=loader)

    def add(self, adapter: Adapter, name: str) -> AdapterTarget:
        with self.registry as registry:
            version = registry.add(adapter, name)
        return AdapterTarget(serving_digest=version.serving_digest, version_digest=version.digest, label=name)


@dataclass
class Answer:
    """Everything the engine said about one request."""

    tokens: list[int] = field(default_factory=list)
    events: list[TokenEvent] = field(default_factory=list)
    rejected: Rejected | None = None

    @property
    def finish_reason(self) -> str | None:
        return self.events[-1].finish_reason if self.events else None


def collect(messages: list[tuple[bytes, FromEngine]], answers: dict[str, Answer]) -> None:
    """Sorts what a step told by request."""
    for _, message in messages:
        if isinstance(message, StepEvents):
            for event in message.events:
                answer = answers.setdefault(event.request_id, Answer())
                assert answer.finish_reason is None, "nothing follows the end of a request"
                answer.events.append(event)
                answer.tokens += event.token_ids
        elif isinstance(message, Rejected):
            answers.setdefault(message.request_id, Answer()).rejected = message


def run_to_end(engine: Engine, max_steps: int = 10_000) -> dict[str, Answer]:
    """Steps until the engine is idle; what each request was told."""
    answers: dict[str, Answer] = {}
    for _ in range(max_steps):
        if engine.is_idle:
            return answers
        collect(engine.step(wait_s=10.0), answers)
    raise AssertionError(f"not idle after {max_steps} steps: {engine.heartbeat()}")


def ask(
    engine: Engine,
    request_id: str,
    prompt: list[int],
    adapter: AdapterTarget | None = None,
    sampling: SamplingParams = GREEDY,
) -> None:
    engine.submit(Submit(request_id=request_id, prompt=tuple(prompt), sampling=sampling, adapter=adapter))


def held_pages(engine: Engine) -> int:
    """Pages that neither are free nor belong to a resident adapter."""
    return engine.pages.num_usable - engine.pages.num_free - engine.pages.count(Use.ADAPTER)


class LogitsTap:
    """Keeps the logits of every token that each request draws, by wrapping one engine's runner."""

    def __init__(self, engine: Engine) -> None:
        self.rows: dict[str, list[Tensor]] = {}
        forward = engine.runner.forward

        def tapped(batch: Any) -> Tensor:
            logits = forward(batch)
            for chunk, row in zip(batch.sampled, logits, strict=True):
                self.rows.setdefault(chunk.sequence.key[1], []).append(row.clone())
            return logits

        engine.runner.forward = tapped  # type: ignore[method-assign]

    def of(self, request_id: str) -> Tensor:
        """float32 [tokens, vocab_size]"""
        return torch.stack(self.rows[request_id])
