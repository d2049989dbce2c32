"""What Flora claims of itself, held against rows: each figure, its bound, and what was measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Claim:
    """`of` alone, or divided by (minus, where `is_difference`) the best of `against`, of the same commit."""

    what: str
    field: str  # of the rows; a dot leads into what it holds
    of: str  # label
    against: tuple[str, ...] = ()  # labels
    against_field: str = ""  # where it is another one
    is_difference: bool = False
    at_least: float | None = None
    at_most: float | None = None

    @property
    def bound(self) -> str:
        return f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"


@dataclass(frozen=True, slots=True)
class Finding:
    claim: Claim
    gpu: str
    value: float
    holds: bool


def _at_least(what: str, bound: float, of: str, *against: str, field: str = "req_s", minus: bool = False) -> Claim:
    return Claim(what, field, of, against, is_difference=minus, at_least=bound)


CLAIMS = (
    _at_least("requests/s, no adapters", 37, "table/0"),
    _at_least("requests/s, 5 adapters", 33, "table/5"),
    _at_least("requests/s, 100 adapters, cold", 28, "table/100"),
    _at_least("requests/s, 1,000 adapters, cold", 22, "table/1000"),
    _at_least("2,000 adapters over 1,000", 0.90, "table/2000", "table/1000"),
    _at_least("over vLLM, no adapters", 1.0, "table/0", "vllm/0"),
    _at_least("over vLLM, 5 adapters", 1.0, "table/5", "vllm/5"),
    _at_least("over vLLM, 100 adapters, cold", 1.0, "table/100", "vllm/100"),
    _at_least("over vLLM, 1,000 adapters, cold", 1.0, "table/1000", "vllm/1000"),
    _at_least("256 clients over HTTP, over the engine itself", 0.90, "http/100", "table/100"),
    Claim("base rows beside adapters, step over a server's without", "step_ms_p50", "base/beside", ("base/alone",),
          at_most=1.01),
    Claim("50 loads a second: p99 gap over before", "gap_p99_ratio", "storm/50", at_most=1.2),
    _at_least("shrink and expand, 128 adapters, TB/s of true bytes", 2.2, "kernels", field="lora_tb_s"),
    _at_least("paged decode attention, TB/s", 2.4, "kernels", field="decode_tb_s"),
    Claim("pages held after 10,000 requests", "kv_pages_left", "leak", at_most=0),
    Claim("ms a token, one stream, rank 64 on all seven", "tpot_adapter_ms.p50", "latency", at_most=6.5),
    Claim("ms to the first token, adapter in host memory, over the base's", "ttft_host_ms.p50", "latency", ("latency",),
          against_field="ttft_base_ms.p50", is_difference=True, at_most=10),
    Claim("bf16 error over PEFT's", "error_ratio", "gate", at_most=2.0),
    _at_least("S1: 2,000 adapters over 5", 0.95, "S1/2000", "S1/5"),
    _at_least("S2: 2,000 adapters over 5", 0.90, "S2/2000", "S2/5"),
    _at_least("S2: 2,000 adapters in clusters of 100 over 5", 0.90, "S2/2000/cluster-100", "S2/5"),
    _at_least("S1, adapters in fp8: 2,000 over 5", 0.95, "S1/2000/fp8", "S1/5/fp8"),
    _at_least("S2, adapters in fp8: 2,000 over 5", 0.90, "S2/2000/fp8", "S2/5/fp8"),
    _at_least("1,000 adapters, in fp8 over in bf16", 1.0, "table/1000/fp8", "table/1000"),
    _at_least("1,000 adapters on all seven projections, in fp8 over in bf16", 1.0, "linear/1000/fp8", "linear/1000"),
    _at_least("S2: on the fly over merged in S-LoRA's order, 5 adapters", 1.9, "S2/5", "S2/5/merged/queue"),
    _at_least("S2: on the fly over merged in S-LoRA's pool and order, 5 adapters", 1.9,
              "S2/5/capped", "S2/5/capped/merged/queue"),
    _at_least("S2: on the fly over merged in the best order, 5 adapters", 1.9, "S2/5", "S2/5/merged"),
    _at_least("S2: unified pool over fixed slots, 200 adapters", 1.15, "S2/200",
              "S2/200/fixed-144", "S2/200/fixed-128"),
    _at_least("S2: unified pool over fixed slots, 2,000 adapters", 1.15, "S2/2000",
              "S2/2000/fixed-160", "S2/2000/fixed-176", "S2/2000/fixed-192"),
    _at_least("S2: unified pool over fixed slots, pool of 7 GiB", 1.5, "S2/200/capped",
              "S2/200/capped/fixed-20", "S2/200/capped/fixed-24"),
    _at_least("S2: early abort minus first come, in time, cv 1", 0.5, "S2/200/abort/cv1", "S2/200/fcfs/cv1",
              field="slo_attainment", minus=True),
    _at_least("S2: early abort minus first come, in time, cv 4", 0.0, "S2/200/abort/cv4", "S2/200/fcfs/cv4",
              field="slo_attainment", minus=True),
    _at_least("S2: clusters of 8 over any, 32 adapters", 1.0, "S2/32/cluster-8", "S2/32/any"),
    Claim("S2: first token p99 with prefetch over without", "ttft_ms_p99", "S2/2000/prefetch", ("S2/2000/no-prefetch",),
          at_most=1.0),
    _at_least("S2: over PEFT, 100 adapters", 30, "S2/100", "peft/100"),
    _at_least("20 fine-tunes: adapters over full checkpoints", 1.0, "cost/adapters/20", "cost/checkpoints/20"),
    _at_least("any batch alike: requests/s kept, 100 adapters", 0.0, "invariant/100", "table/100"),
    _at_least("temperature 0.8 and top-p 0.95: requests/s kept, 100 adapters", 0.95, "drawn/100", "table/100"),
)  # fmt: skip


def findings_of(rows: Rows, claims: Sequence[Claim] = CLAIMS) -> list[Finding]:
    """The claims that these rows bear on, each GPU by itself: one kind's rows say nothing about another's."""
    found = []
    for gpu in dict.fromkeys(row.get("gpu") for row in rows if label_of(row)):
        of_gpu = [row for row in rows if row.get("gpu") == gpu]
        for claim in claims:
            value = _value(claim, of_gpu)
            if value is not None:
                low = claim.at_least is None or value >= claim.at_least
                high = claim.at_most is None or value <= claim.at_most
                found.append(Finding(claim, str(gpu or "cpu"), value, low and high))
    return found


def measured(rows: Rows, label: str, field: str) -> float | None:
    """The field of the rows of this label: the latest commit's, of its passes the median. None: not measured."""
    usable = [row for row in rows if label_of(row) == label and _get(row, field) is not None]
    latest = usable[-1].get("commit") if usable else None
    values = [float(_get(row, field)) for row in usable if row.get("commit") == latest]
    return median(values) if values else None


def label_of(row: Mapping[str, Any]) -> str | None:
    """A row's label; of a cold row of vLLM on the table's workload, which has none, `vllm/ADAPTERS`."""
    workload = (row.get("shape"), row.get("modules"), row.get("rate"), row.get("warm"))
    if row.get("system") == "vllm" and workload == ("llama3-8b", "attention", 0, False):
        return f"vllm/{row.get('adapters')}"
    return row.get("label")


def of_one_commit(rows: Rows, labels: Sequence[str], needed: str | None = None) -> Rows:
    """Of the rows of these labels those that may be compared: of the commit that has the most of the labels, of several
    the one whose row comes last. A peer's row has the commit of Flora that it ran beside, or `alone` if none did, and
    is then compared with nothing; without either it goes with any.

    needed  a label that the commit must have
    """
    own = [row for row in rows if label_of(row) in labels]
    there: dict[Any, set[str | None]] = {}
    for row in own:
        commit = row.get("commit")
        there[commit] = there.pop(commit, set()) | {label_of(row)}  # its latest row decides its place
    commits = [commit for commit, found in there.items() if commit is not None and (needed is None or needed in found)]
    chosen = max(reversed(commits), key=lambda commit: len(there[commit]), default=None)
    return [row for row in own if row.get("commit") in (None, chosen)]


def _value(claim: Claim, rows: Rows) -> float | None:
    if not claim.against:
        return measured(rows, claim.of, claim.field)
    rows = of_one_commit(rows, (claim.of, *claim.against), needed=claim.of)
    value = measured(rows, claim.of, claim.field)
    if value is None:
        return None
    others = [measured(rows, label, claim.against_field or claim.field) for label in claim.against]
    known = [other for other in others if other is not None]
    if not known:
        return None
    best = max(known)
    if claim.is_difference:
        return value - best
    return value / best if best else None


def _get(row: Mapping[str, Any], path: str) -> Any:
    held: Any = row
    for key in path.split("."):
        held = held.get(key) if isinstance(held, Mapping) else None
    return held
