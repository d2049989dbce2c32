"""What each engine takes: `flora compat`'s own answers about a few adapters that stand for kinds of them."""

from flora.adapter import AdapterHeader, BaseBinding, ExactTensor, Module, Recipe
from flora.registry.formats.compat import TABLE_VERSION, judge

_SHOWN = {"yes": "yes", "portable": "`portable`", "no": "no"}


def _module(name: str, rank: int, **more: object) -> Module:
    facts = {"dtype": "bfloat16", "a_sha256": "", "b_sha256": ""} | more
    return Module(name=name, in_features=1024, out_features=1024, rank=rank, alpha=float(rank), **facts)  # type: ignore[arg-type]


def _header(*modules: Module, exact: tuple[ExactTensor, ...] = ()) -> AdapterHeader:
    base = BaseBinding(name="base", base_id=None, architecture="LlamaForCausalLM")
    return AdapterHeader(base=base, modules=modules, recipe=Recipe(operation="extract"), exact=exact)


def _both(**more: object) -> tuple[Module, Module]:
    return _module("model.layers.0.mlp.gate_proj", 16, **more), _module("model.layers.1.mlp.gate_proj", 16, **more)


def kinds() -> dict[str, AdapterHeader]:
    """Kind of adapter -> one of them."""
    first, second = _both()
    return {
        "one rank for all": _header(first, second),
        "a rank for each module": _header(first, _module(second.name, 8)),
        "a layer left out": _header(first, _module("model.layers.1.mlp.down_proj", 16)),
        "q and k, no v": _header(*(_module(f"model.layers.0.self_attn.{leaf}", 16) for leaf in ("q_proj", "k_proj"))),
        "rank 600": _header(_module(first.name, 600), _module(second.name, 600)),
        "`--dtype float8`": _header(*_both(dtype="float8_e4m3fn")),
        "`--embeddings`": _header(first, second, _module("model.embed_tokens", 16, kind="embedding")),
        "`--vectors`": _header(
            first, second, exact=(ExactTensor(name="model.norm.weight", shape=(1024,), dtype="bfloat16", sha256=""),)
        ),
    }


def engine_table() -> str:
    answers = {kind: judge(header) for kind, header in kinds().items()}
    rows = [f"| engine, table of {TABLE_VERSION} | {' | '.join(answers)} |", "| --- |" + " --- |" * len(answers)]
    for engine in zip(*answers.values(), strict=True):
        cells = " | ".join(_SHOWN[verdict.answer] for verdict in engine)
        rows.append(f"| {engine[0].engine} {engine[0].version} | {cells} |")
    return "\n".join(rows)
