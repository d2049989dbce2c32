"""What each engine will say of an adapter: a verdict from its header and a table of what engines of that version take.

The table was read from the engines' own loaders, in the versions that it names; a newer one may take more.
"""

from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import Literal

from flora.adapter import AdapterHeader, ChangeReport
from flora.forms import EXPERT_KINDS

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
class _Facts:
    """What engines ask about."""

    rank: int
    portable_rank: int
    ranks_differ: bool
    misses_layers: bool  # some layer lacks a kind of module that another has
    kinds: frozenset[str]  # `forms.Kind`
    has_exact: bool
    architecture: str
    leaves: frozenset[str]
    is_fp8: bool
    parted: frozenset[str]  # leaves that are missing beside others of one joined matrix
    unmended: frozenset[str]  # those of them that no padding brings


_WORDS = {
    "parameter": "routers or tables of positions (without --routers and --embeddings there are none)",
    "expert": "experts fused in one tensor",
    "expert_transposed": "experts fused in one tensor",
}
_Rule = Callable[[_Facts], str | None]  # a reason against, if there is one


@dataclass(frozen=True, slots=True)
class _Engine:
    name: str
    version: str
    needs_portable: tuple[_Rule, ...]  # what the portable profile mends
    refuses: tuple[_Rule, ...]  # what nothing mends here
    command: str
    limit: Callable[[_Facts], str] = lambda facts: ""  # what to start the engine with


def judge(header: AdapterHeader, report: ChangeReport | None = None) -> list[Verdict]:
    """One verdict per engine, in a fixed order.

    report  lists the base's matrices: layers that the adapter never touches are known by it alone
    """
    facts = _facts(header, report)
    return [_judge(engine, facts) for engine in _ENGINES]


def _judge(engine: _Engine, facts: _Facts) -> Verdict:
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


# What stands against an adapter


def _ranks(facts: _Facts) -> str | None:
    return "modules have ranks of their own, which it does not read right" if facts.ranks_differ else None


def _layers(facts: _Facts) -> str | None:
    return "it drops a kind of module that one layer lacks" if facts.misses_layers else None


def _parted(facts: _Facts) -> str | None:
    return _missing(facts.parted)


def _unmended(facts: _Facts) -> str | None:
    return _missing(facts.unmended)


def _lorax_rank(facts: _Facts) -> str | None:
    return _rounded(facts.rank)


def _lorax_rank_left(facts: _Facts) -> str | None:
    return _rounded(facts.portable_rank)


def _rounded(rank: int) -> str | None:
    return None if rank == 8 or rank % 16 == 0 else f"it scales rank {rank} wrong: it keeps 8 and multiples of 16"


def _trt_names(facts: _Facts) -> str | None:
    found = sorted(facts.leaves - _TRT_LEAVES)
    return f"it knows no modules {', '.join(found)}" if found else None


def _missing(leaves: Set[str]) -> str | None:
    return f"it joins q, k, v and gate, up, and {', '.join(sorted(leaves))} is not adapted" if leaves else None


def _expert_names(facts: _Facts) -> str | None:
    found = sorted(facts.leaves & {"w1", "w2", "w3"})
    return f"it knows no target modules {', '.join(found)}" if found else None


def _fp8(facts: _Facts) -> str | None:
    return "factors are fp8, which it does not read" if facts.is_fp8 else None


def _exact(facts: _Facts) -> str | None:
    return "it carries norms or biases whole, which the engine does not apply" if facts.has_exact else None


def _embedding(facts: _Facts) -> str | None:
    return "it adapts the embedding, which the engine does not apply" if "embedding" in facts.kinds else None


def _head(facts: _Facts) -> str | None:
    return "it adapts lm_head, which the engine does not apply" if "lm_head" in facts.leaves else None


def _only_linear(facts: _Facts) -> str | None:
    return _strange(facts.kinds - {"linear", "embedding"})


def _linear_and_experts(facts: _Facts) -> str | None:
    return _strange(facts.kinds - {"linear", "embedding", *EXPERT_KINDS})


def _no_parameters(facts: _Facts) -> str | None:
    return _strange(facts.kinds & {"parameter", *EXPERT_KINDS})


def _strange(kinds: Set[str]) -> str | None:
    words = sorted({_WORDS.get(kind, f"{kind} modules") for kind in kinds})
    return f"it has {', '.join(words)}" if words else None


def _ollama_base(facts: _Facts) -> str | None:
    known = facts.architecture.startswith(("Llama", "Gemma2", "Mistral", "unknown"))
    return None if known else f"its converter knows no {facts.architecture}"


def _above(limit: int) -> _Rule:
    return lambda facts: f"rank {facts.rank} is above its {limit}" if facts.rank > limit else None


def vllm_rank(rank: int) -> int:
    """The smallest --max-lora-rank of vLLM that holds `rank`; the rank itself if none does."""
    return next((size for size in (1, 8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)


_TRT_LEAVES = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down", "gate_up")} | {
    *("w1", "w2", "w3", "gate", "embed_tokens", "lm_head")  # the last two it passes over, told by rules of their own
}
_PORTABLE = "flora export REF --profile portable --out DIR"
_ENGINES = (
    _Engine("PEFT", "0.21", (), (), "flora export REF --out DIR"),
    _Engine(
        "vLLM",
        "0.33",
        (_fp8,),
        (_exact, _linear_and_experts, _above(512)),
        "flora export REF --out DIR",
        lambda facts: f"; vllm serve --enable-lora --max-lora-rank {vllm_rank(facts.portable_rank)}",
    ),
    _Engine(
        "vLLM",
        "0.26",
        (_ranks, _fp8),
        (_exact, _only_linear, _above(512)),
        _PORTABLE,
        lambda facts: f"; vllm serve --enable-lora --max-lora-rank {vllm_rank(facts.portable_rank)}",
    ),
    _Engine(
        "SGLang",
        "0.5",
        (_ranks, _parted, _fp8),
        (_exact, _unmended, _expert_names, _only_linear),
        _PORTABLE,
        lambda facts: f"; sglang --max-lora-rank {facts.portable_rank}",
    ),
    _Engine(
        "LoRAX",
        "2026-05",
        (_ranks, _lorax_rank, _layers, _fp8),
        (_exact, _embedding, _lorax_rank_left, _only_linear),
        _PORTABLE,
    ),
    _Engine(
        "TensorRT-LLM / NIM",
        "2.0",
        (_ranks, _fp8),
        (_exact, _embedding, _head, _trt_names, _only_linear, _above(512)),
        "flora export REF --format nim --out $NIM_PEFT_SOURCE",
    ),
    _Engine(
        "llama.cpp",
        "2026-11",
        (_ranks, _fp8),
        (_exact, _embedding, _head, _only_linear),
        "flora export REF --format gguf --base BASE --out DIR",
    ),
    _Engine(
        "Ollama",
        "2026-11",
        (_ranks, _fp8),
        (_exact, _embedding, _head, _only_linear, _ollama_base),
        "flora export REF --format gguf --base BASE --out DIR",
    ),
    _Engine(
        "MLX-LM",
        "0.32",
        (_ranks, _fp8),
        (_exact, _embedding, _only_linear),
        "flora export REF --format mlx --out DIR",
    ),
    _Engine(
        "diffusers",
        "0.42",
        (_fp8,),
        (_exact, _embedding, _no_parameters),
        "flora export REF --format diffusers --out DIR",
    ),
    _Engine(
        "kohya", "2026-11", (_fp8,), (_exact, _embedding, _no_parameters), "flora export REF --format kohya --out DIR"
    ),
)


def _facts(header: AdapterHeader, report: ChangeReport | None) -> _Facts:
    from flora.registry.formats.kinds import kind_of
    from flora.registry.formats.padding import missing_partners, padding_of, portable_rank

    modules = header.modules
    linear = [module.name for module in modules if module.kind == "linear"]
    padding = padding_of(header, report)
    return _Facts(
        rank=header.max_rank,
        portable_rank=portable_rank(header),
        ranks_differ=len({(module.rank, module.alpha) for module in modules}) > 1,
        misses_layers=bool(padding.layers),
        kinds=frozenset(module.kind for module in modules),
        has_exact=bool(header.exact_tensors),
        architecture=header.base.architecture,
        leaves=frozenset(kind_of(module.name).rpartition(".")[2] for module in modules)
        | frozenset(tied.rpartition(".")[2] for module in modules for tied in module.tied),
        is_fp8=any(module.dtype == "float8_e4m3fn" for module in modules),
        parted=frozenset(name.rpartition(".")[2] for name in missing_partners(linear)),
        unmended=padding.lacking,
    )
