"""The model card: README.md of a pushed adapter, whose YAML the Hub reads and whose tables people do."""

import re
import shlex
from collections import defaultdict
from collections.abc import Iterator, Sequence

from flora.adapter import Adapter, AdapterHeader, ChangeReport, TensorChange
from flora.portrait import LEVELS, Curve, portrait
from flora.registry.records import Version

_TAGS = ["lora", "flora", "peft", "extracted"]
_MAX_LISTED = 12  # tensors named one by one; the rest is summed up
_BAR = 40  # characters of a whole
_FLAGS = {
    "rank": "--rank",
    "energy": "--energy",
    "budget_bytes": "--budget",
    "factor_dtype": "--dtype",
    "include": "--include",
    "exclude": "--exclude",
    "embeddings": "--embeddings",
    "vectors": "--vectors",
    "routers": "--routers",
}


def model_card(adapter: Adapter, version: Version, repo: str) -> str:
    """The card of `version`, as `repo` on the Hub shows it."""
    parts = [_front_matter(adapter.header), _title(adapter.header, version)]
    if adapter.report:
        parts += [_kept(adapter.report), _plot(portrait(adapter).whole(), version), _not_extracted(adapter.report)]
    parts += [_usage(adapter.header, version, repo), _origin(adapter.header, version)]
    return "\n".join(part for part in parts if part)


def _front_matter(header: AdapterHeader) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=header.base.name,
        base_model_relation="adapter",
        library_name="peft",
        pipeline_tag="text-generation",
        tags=_TAGS if header.recipe.operation != "import" else [tag for tag in _TAGS if tag != "extracted"],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _title(header: AdapterHeader, version: Version) -> str:
    ranks = sorted({module.rank for module in header.modules})
    spread = f"ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"rank {header.max_rank}"
    tuned = f" of the fully fine-tuned `{header.recipe.tuned_name}`" if header.recipe.tuned_name else ""
    return (
        f"# {version.name}\n\n"
        f"A LoRA adapter for `{header.base.name}`: a low-rank form{tuned}, made with Flora. "
        f"It has {len(header.modules)} modules, {spread}, {header.num_parameters:,} parameters.\n"
    )


def _kept(report: ChangeReport) -> str:
    """What was kept, by kind of module. Energy is the squared Frobenius norm of the change of a weight matrix."""
    kinds: dict[str, list[TensorChange]] = defaultdict(list)
    for tensor in report.tensors:
        if tensor.status == "extracted":
            kinds[_kind(tensor.name)].append(tensor)
    rows = [_row(f"`{kind}`", report, kinds[kind]) for kind in sorted(kinds)]
    extracted = [tensor for tensors in kinds.values() for tensor in tensors]
    return "\n".join(
        [
            "## What it keeps\n",
            "Energy is the squared norm of the change from base to tuned weights, measured on the factors as stored.\n",
            "| module | matrices | rank | kept energy | share of the whole change |",
            "| --- | ---: | ---: | ---: | ---: |",
            *rows,
            _row("**all extracted**", report, extracted),
            f"| **whole change** | {sum(t.norm_squared > 0 for t in report.tensors)} | | "
            f"**{_percent(report.kept_share)}** | {_percent(1.0)} |\n",
        ]
    )


def _row(label: str, report: ChangeReport, tensors: Sequence[TensorChange]) -> str:
    total = sum(tensor.norm_squared for tensor in tensors)
    kept = sum(tensor.kept for tensor in tensors) / total if total else 1.0
    ranks = sorted({tensor.rank or 0 for tensor in tensors}) or [0]
    spread = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"
    share = total / report.norm_squared if report.norm_squared else 0.0
    return f"| {label} | {len(tensors)} | {spread} | {_percent(kept)} | {_percent(share)} |"


def _plot(curve: Curve, version: Version) -> str:
    """Energy against rank as bars of text, which every reader of Markdown shows."""
    most = len(curve.shares) - 1
    ranks = [*(2**power for power in range(most.bit_length()) if 2**power < most), most]
    bars = [f"rank {rank:>4}  {_bar(curve.shares[rank])} {100 * curve.shares[rank]:5.1f} %" for rank in ranks]
    reached = ((level, curve.rank_for(level)) for level in LEVELS)
    levels = ", ".join(f"{100 * level:.0f} % from rank {rank}" for level, rank in reached if rank is not None)
    return "\n".join(
        [
            "## Energy against rank\n",
            "What of the extracted modules' change is left if no module has more than so many terms"
            + (f": {levels}." if levels else "."),
            f"`flora prune {version.name} --rank N` cuts so without the checkpoints.\n",
            "```",
            *bars,
            "```",
            "",
        ]
    )


def _bar(share: float) -> str:
    filled = round(_BAR * min(1.0, max(0.0, share)))
    return "█" * filled + "░" * (_BAR - filled)


def _not_extracted(report: ChangeReport) -> str:
    left = [t for t in report.tensors if t.status in ("not_extractable", "excluded") and t.norm_squared > 0]
    if not left:
        return ""
    left.sort(key=lambda tensor: -tensor.norm_squared)
    listed, rest = left[:_MAX_LISTED], left[_MAX_LISTED:]
    lines = [f"| `{t.name}` | {_percent(report.share(t))} | {t.reason or t.status} |" for t in listed]
    if rest:
        lines.append(f"| {len(rest)} more | {_percent(sum(map(report.share, rest)))} | |")
    return "\n".join(
        [
            "## What it does not carry\n",
            f"{_percent(sum(map(report.share, left)))} of the change lies in tensors that are no part of it.\n",
            "| tensor | share of the whole change | why |",
            "| --- | ---: | --- |",
            *lines,
            "",
        ]
    )


def _usage(header: AdapterHeader, version: Version, repo: str) -> str:
    base, name = header.base.name, version.name.rpartition("/")[2]
    return f"""## How to use it

With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{repo}")
```

With vLLM:

```
vllm serve {base} --enable-lora --max-lora-rank {_vllm_rank(header.max_rank)} --lora-modules {name}={repo}
```

With SGLang:

```
python -m sglang.launch_server --model-path {base} --lora-paths {name}={repo}
```

With Flora, beside any number of other adapters of the same base:

```
flora pull {repo} --name {name}
flora serve {base}
```
"""


def _origin(header: AdapterHeader, version: Version) -> str:
    lines = ["## Where it comes from\n"]
    if command := _command(header):
        lines.append(f"```\n{command}\n```\n")
    facts = {
        "base": f"`{header.base.name}`, base id `{header.base.base_id or 'not proven'}`",
        "tuned checkpoint": f"`{header.recipe.tuned_id}`" if header.recipe.tuned_id else None,
        "version": f"`{version.ref}`, digest `{version.digest}`",
        "serving digest": f"`{version.serving_digest}`",
        "made from": ", ".join(f"`{parent}`" for parent in header.recipe.parents) or None,
    }
    lines += [f"- {name}: {fact}" for name, fact in facts.items() if fact]
    return "\n".join(lines) + "\n"


def _command(header: AdapterHeader) -> str | None:
    """The command that makes this adapter again, as far as one does."""
    recipe = header.recipe
    if recipe.operation == "extract" and recipe.tuned_name:
        words = ["flora", "extract", header.base.name, recipe.tuned_name]
    elif recipe.operation == "prune" and recipe.parents:
        words = ["flora", "prune", f"NAME@{recipe.parents[0]}"]
    else:
        return None
    return shlex.join([*words, *_flags(recipe.options)])


def _flags(options: dict[str, str | int | float | bool | None]) -> Iterator[str]:
    for name, flag in _FLAGS.items():
        if (value := options.get(name)) is True:
            yield flag
        elif value is not None:
            for part in str(value).split(",") if name in ("include", "exclude") else [str(value)]:
                yield from (flag, part)


def _kind(name: str) -> str:
    """The module's own name: q_proj of model.layers.0.self_attn.q_proj.weight."""
    return re.sub(r"\.weight$", "", name).rpartition(".")[2]


def _vllm_rank(rank: int) -> int:
    """The smallest of the sizes that vLLM takes."""
    return next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
