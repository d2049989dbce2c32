"""What each engine will say of an adapter: a verdict from its header and a table of what engines of that version take.

The table was read from the engines' own loaders, in the versions that it names; a newer one may take more.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from flora.adapter import AdapterHeader, ChangeReport
from flora.registry.formats import objections as against

TABLE_VERSION = "2026-11"
Answer = Literal["yes", "portable", "no"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one engine does with the adapter."""

    engine: str
    version: str  # of the engine whose loader was read
    answer: Answer  # as it is stored; only as the portable profile; not at all
    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class _Engine:
    name: str
    version: str
    needs_portable: tuple[against.Rule, ...]  # what the portable profile mends
    refuses: tuple[against.Rule, ...]  # what nothing mends here
    command: str
    limit: Callable[[against.Facts], str] = lambda facts: ""  # what to start the engine with


def judge(header: AdapterHeader, report: ChangeReport | None = None) -> list[Verdict]:
    """One verdict per engine, in a fixed order.

    report  lists the base's matrices: layers that the adapter never touches are known by it alone
    """
    facts = against.facts_of(header, report)
    return [_judge(engine, facts) for engine in _ENGINES]


def _judge(engine: _Engine, facts: against.Facts) -> Verdict:
    refusals = [reason for rule in engine.refuses if (reason := rule(facts))]
    limit = engine.limit(facts)
    if refusals:
        return Verdict(engine.name, engine.version, "no", "; ".join(refusals), _remedy(refusals))
    mends = [reason for rule in engine.needs_portable if (reason := rule(facts))]
    if mends:
        return Verdict(engine.name, engine.version, "portable", "; ".join(mends), engine.command + limit)
    return Verdict(engine.name, engine.version, "yes", "takes it as it is", engine.command + limit)


def _remedy(reasons: Iterable[str]) -> str:
    text = " ".join(reasons)
    if "rank" in text:
        return "flora prune REF --rank N"
    if "joins" in text:
        return "serve it with vLLM or Flora"
    return "extract again with --exclude, or serve it with Flora"


def vllm_rank(rank: int) -> int:
    """The smallest --max-lora-rank of vLLM that holds `rank`; the rank itself if none does."""
    return next((size for size in (1, 8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)


_PORTABLE = "flora export REF --profile portable --out DIR"
_ENGINES = (
    _Engine("PEFT", "0.21", (), (), "flora export REF --out DIR"),
    _Engine(
        "vLLM",
        "0.33",
        (against.fp8,),
        (against.exact, against.linear_and_experts, against.above(512)),
        "flora export REF --out DIR",
        lambda facts: f"; vllm serve --enable-lora --max-lora-rank {vllm_rank(facts.portable_rank)}",
    ),
    _Engine(
        "vLLM",
        "0.26",
        (against.ranks, against.fp8),
        (against.exact, against.only_linear, against.above(512)),
        _PORTABLE,
        lambda facts: f"; vllm serve --enable-lora --max-lora-rank {vllm_rank(facts.portable_rank)}",
    ),
    _Engine(
        "SGLang",
        "0.5",
        (against.ranks, against.parted, against.fp8),
        (against.exact, against.unmended, against.expert_names, against.only_linear),
        _PORTABLE,
        lambda facts: f"; sglang --max-lora-rank {facts.portable_rank}",
    ),
    _Engine(
        "LoRAX",
        "2026-05",
        (against.ranks, against.lorax_rank, against.layers, against.fp8),
        (against.exact, against.embedding, against.lorax_rank_left, against.only_linear),
        _PORTABLE,
    ),
    _Engine(
        "TensorRT-LLM / NIM",
        "2.0",
        (against.ranks, against.fp8),
        (against.exact, against.embedding, against.head, against.trt_names, against.only_linear, against.above(512)),
        "flora export REF --format nim --out $NIM_PEFT_SOURCE",
    ),
    _Engine(
        "llama.cpp",
        "2026-11",
        (against.ranks, against.fp8),
        (against.exact, against.embedding, against.head, against.only_linear),
        "flora export REF --format gguf --base BASE --out DIR",
    ),
    _Engine(
        "Ollama",
        "2026-11",
        (against.ranks, against.fp8),
        (against.exact, against.embedding, against.head, against.only_linear, against.ollama_base),
        "flora export REF --format gguf --base BASE --out DIR",
    ),
    _Engine(
        "MLX-LM",
        "0.32",
        (against.ranks, against.fp8),
        (against.exact, against.embedding, against.only_linear),
        "flora export REF --format mlx --out DIR",
    ),
    _Engine(
        "diffusers",
        "0.42",
        (against.fp8,),
        (against.exact, against.embedding, against.no_parameters),
        "flora export REF --format diffusers --out DIR",
    ),
    _Engine(
        "kohya",
        "2026-11",
        (against.fp8,),
        (against.exact, against.embedding, against.no_parameters),
        "flora export REF --format kohya --out DIR",
    ),
)
