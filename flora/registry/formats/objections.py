"""What may stand against an adapter in an engine: the facts that count, and a rule for each thing that one minds."""

from collections.abc import Callable, Set
from dataclasses import dataclass

from flora.adapter import AdapterHeader, ChangeReport
from flora.forms import EXPERT_KINDS
from flora.registry.formats.kinds import kind_of
from flora.registry.formats.padding import missing_partners, padding_of, portable_rank

_WORDS = {
    "parameter": "routers or tables of positions (without --routers and --embeddings there are none)",
    "expert": "experts fused in one tensor",
    "expert_transposed": "experts fused in one tensor",
}
_TRT_LEAVES = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down", "gate_up")} | {
    *("w1", "w2", "w3", "gate", "embed_tokens", "lm_head")  # the last two it passes over, told by rules of their own
}


@dataclass(frozen=True, slots=True)
class Facts:
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


Rule = Callable[[Facts], str | None]  # a reason against, if there is one


def facts_of(header: AdapterHeader, report: ChangeReport | None) -> Facts:
    """The facts of the adapter with that header;  report  as for `compat.judge`."""
    modules = header.modules
    linear = [module.name for module in modules if module.kind == "linear"]
    padding = padding_of(header, report)
    return Facts(
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


def ranks(facts: Facts) -> str | None:
    return "modules have ranks of their own, which it does not read right" if facts.ranks_differ else None


def layers(facts: Facts) -> str | None:
    return "it drops a kind of module that one layer lacks" if facts.misses_layers else None


def parted(facts: Facts) -> str | None:
    return _missing(facts.parted)


def unmended(facts: Facts) -> str | None:
    return _missing(facts.unmended)


def lorax_rank(facts: Facts) -> str | None:
    return _rounded(facts.rank)


def lorax_rank_left(facts: Facts) -> str | None:
    return _rounded(facts.portable_rank)


def _rounded(rank: int) -> str | None:
    return None if rank == 8 or rank % 16 == 0 else f"it scales rank {rank} wrong: it keeps 8 and multiples of 16"


def trt_names(facts: Facts) -> str | None:
    found = sorted(facts.leaves - _TRT_LEAVES)
    return f"it knows no modules {', '.join(found)}" if found else None


def _missing(leaves: Set[str]) -> str | None:
    return f"it joins q, k, v and gate, up, and {', '.join(sorted(leaves))} is not adapted" if leaves else None


def expert_names(facts: Facts) -> str | None:
    found = sorted(facts.leaves & {"w1", "w2", "w3"})
    return f"it knows no target modules {', '.join(found)}" if found else None


def fp8(facts: Facts) -> str | None:
    return "factors are fp8, which it does not read" if facts.is_fp8 else None


def exact(facts: Facts) -> str | None:
    return "it carries norms or biases whole, which the engine does not apply" if facts.has_exact else None


def embedding(facts: Facts) -> str | None:
    return "it adapts the embedding, which the engine does not apply" if "embedding" in facts.kinds else None


def head(facts: Facts) -> str | None:
    return "it adapts lm_head, which the engine does not apply" if "lm_head" in facts.leaves else None


def only_linear(facts: Facts) -> str | None:
    return _strange(facts.kinds - {"linear", "embedding"})


def linear_and_experts(facts: Facts) -> str | None:
    return _strange(facts.kinds - {"linear", "embedding", *EXPERT_KINDS})


def no_parameters(facts: Facts) -> str | None:
    return _strange(facts.kinds & {"parameter", *EXPERT_KINDS})


def _strange(kinds: Set[str]) -> str | None:
    words = sorted({_WORDS.get(kind, f"{kind} modules") for kind in kinds})
    return f"it has {', '.join(words)}" if words else None


def ollama_base(facts: Facts) -> str | None:
    known = facts.architecture.startswith(("Llama", "Gemma2", "Mistral", "unknown"))
    return None if known else f"its converter knows no {facts.architecture}"


def above(limit: int) -> Rule:
    return lambda facts: f"rank {facts.rank} is above its {limit}" if facts.rank > limit else None
