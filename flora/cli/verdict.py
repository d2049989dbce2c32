"""What an extraction's numbers mean for its user: what was left behind, and what to do about it."""

from collections.abc import Iterator
from dataclasses import dataclass

from flora.adapter import ChangeReport, TensorChange
from flora.cli.output import percent

_LARGE_SHARE = 0.05  # of the whole change, left out: above it a user has to know before trusting the adapter
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
    kept = report.extracted_share
    if kept >= _GOOD:
        return f"low rank fits: the adapter keeps {percent(kept)} of what changed in its modules"
    if kept >= _FAIR:
        return f"usable: {percent(kept)} of what changed in its modules is kept; measure your task"
    return f"lossy: only {percent(kept)} of what changed in its modules is kept; measure your task before relying on it"


def advice(report: ChangeReport) -> Iterator[str]:
    """What the user may want to do, most important first."""
    groups = left_out(report)
    for group in groups:
        if group.share >= _LARGE_SHARE:
            yield (
                f"{percent(group.share)} of the whole change lies in {group.kind}, which this adapter leaves as in the "
                "base; a skill that lives there is lost at any rank, so compare adapter and checkpoint on your task"
            )
    missed = [tensor for tensor in report.tensors if tensor.status == "extracted" and tensor.reason]
    if missed:
        yield f"{len(missed)} modules missed the rule, {missed[0].name} among them: {missed[0].reason}"
    elif report.extracted_share < _FAIR:
        yield "a higher --rank, or --energy 0.9, keeps more, in a larger adapter"


def _kind(tensor: TensorChange) -> str:
    leaf = tensor.name.removesuffix(".weight").rpartition(".")[2]
    if tensor.status == "excluded":
        return "modules that --include and --exclude leave out"
    if "embed" in leaf or leaf in ("wte", "wpe"):
        return "embeddings"
    if leaf in ("lm_head", "embed_out", "output"):
        return "the output head"
    if tensor.name.endswith(".bias"):
        return "biases"
    if "norm" in leaf or leaf.startswith("ln_"):
        return "norms"
    return "tensors that are no linear layers"
