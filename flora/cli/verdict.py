"""What an extraction's numbers mean for its user: what was left behind, and what to do about it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from flora.adapter import ChangeReport, TensorChange
from flora.cli.output import percent
from flora.diagnosis import WRONG_TOOL, diagnose, diagnose_report, noise_share

_LARGE_SHARE = 0.05  # of the whole change, left out: above it a user has to know before trusting the adapter
_LARGE_NOISE = 0.02  # of the extracted change
_CARRIED_BY = {"embeddings": "--embeddings", "the output head": "--embeddings", "routers": "--routers"}
_GOOD, _FAIR = 0.95, 0.80  # kept energy of the extracted modules


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Tensors that changed and are not in the adapter, one kind together."""

    kind: str  # embeddings, norms, biases, …
    count: int
    share: float  # of the whole change


def left_out(report: ChangeReport) -> list[LeftOut]:
    """What changed and was not extracted, largest share first."""
    groups: dict[str, list[TensorChange]] = {}
    for tensor in report.tensors:
        if tensor.status in ("not_extractable", "excluded") and tensor.norm_squared > 0:
            groups.setdefault(_kind(tensor), []).append(tensor)
    found = [
        LeftOut(kind, len(tensors), sum(report.share(tensor) for tensor in tensors)) for kind, tensors in groups.items()
    ]
    return sorted(found, key=lambda group: -group.share)


def verdict(report: ChangeReport) -> str:
    """One sentence on how well low rank fits this change."""
    kept, kind = report.extracted_share, diagnose_report(report)
    if kind == "unchanged":
        return "unchanged: both checkpoints hold the same weights, so there is nothing to extract"
    if kind == "sparse":
        return (
            f"sparse: only {percent(_changed_share(report))} of the modules' weights changed, and they form no low "
            f"rank; this adapter keeps {percent(kept)} of what changed in its modules"
        )
    if kind == "near_full_rank":
        return (
            f"near full rank: the change stands out of noise in no few directions; this adapter keeps {percent(kept)} "
            "of what changed in its modules"
        )
    if kept >= _GOOD:
        return f"low rank fits: the adapter keeps {percent(kept)} of what changed in its modules"
    if kept >= _FAIR:
        return f"usable: {percent(kept)} of what changed in its modules is kept; measure your task"
    return f"lossy: only {percent(kept)} of what changed in its modules is kept; measure your task before relying on it"


def advice(report: ChangeReport) -> Iterator[str]:
    """What the user may want to do, most important first."""
    kind = diagnose_report(report)
    if kind in WRONG_TOOL:
        yield (
            "low rank is the wrong tool for this change: serve the checkpoint itself, or measure your task before "
            "relying on the adapter; --strict makes this exit 3"
        )
    if kind == "low_rank" and report.extracted_share < _GOOD and (ranks := _signal_ranks(report)):
        yield (
            f"up to rank {max(ranks)} (median {sorted(ranks)[len(ranks) // 2]}) directions stand out of the noise; "
            "what a higher rank adds looks like noise"
        )
    noise = noise_share(report)
    if noise >= _LARGE_NOISE:
        yield (
            f"about {percent(noise)} of the change is rounding of the tuned weights to their dtype: no rank can keep "
            f"more than {percent(1 - noise)} with fewer numbers than the change has"
        )
    groups = left_out(report)
    for group in groups:
        flag = _CARRIED_BY.get(group.kind)
        if group.share >= _LARGE_SHARE:
            yield (
                f"{percent(group.share)} of the whole change lies in {group.kind}, which this adapter leaves as in the "
                "base; a skill that lives there is lost at any rank, so compare adapter and checkpoint on your task"
                + (f"; {flag} carries it, for PEFT, not for Flora's server" if flag else "")
            )
    missed = [tensor for tensor in report.tensors if tensor.status == "extracted" and tensor.reason]
    if missed:
        yield f"{len(missed)} modules missed the rule, {missed[0].name} among them: {missed[0].reason}"
    elif report.extracted_share < _FAIR and kind not in WRONG_TOOL:
        goes_on = sum(diagnose(tensor) == "cut_short" for tensor in report.tensors)
        beyond = (
            f": in {goes_on} modules directions past the last one kept still stand out of the noise" if goes_on else ""
        )
        yield f"a higher --rank, or --energy 0.9, keeps more, in a larger adapter{beyond}"


def _changed_share(report: ChangeReport) -> float:
    extracted = [tensor for tensor in report.tensors if tensor.status == "extracted"]
    sizes = [math.prod(tensor.shape) for tensor in extracted]
    return sum((t.changed_share or 0.0) * size for t, size in zip(extracted, sizes, strict=True)) / max(1, sum(sizes))


def _signal_ranks(report: ChangeReport) -> list[int]:
    return [tensor.signal_rank for tensor in report.tensors if tensor.signal_rank is not None]


def _kind(tensor: TensorChange) -> str:
    leaf = tensor.name.removesuffix(".weight").rpartition(".")[2]
    if tensor.status == "excluded":
        return "modules that --include and --exclude leave out"
    if "embed" in leaf or leaf in ("wte", "wpe"):
        return "embeddings"
    if leaf in ("lm_head", "embed_out", "output"):
        return "the output head"
    if leaf in ("gate", "router"):
        return "routers"
    if tensor.name.endswith(".bias"):
        return "biases"
    if "norm" in leaf or leaf.startswith("ln_"):
        return "norms"
    return "tensors that are no linear layers"
