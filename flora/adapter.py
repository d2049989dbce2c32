"""An adapter: low-rank factors, the base they belong to, and the record of what they kept.

Two identities (DESIGN §3). The *serving digest* covers what changes an answer: base id, factors, ranks, scales, chat
template, end tokens. The *version digest*, made by the registry from its manifest, adds report and lineage. Neither
sees a clock, a host or a path.

The records here are msgspec structs: they travel as JSON, and reading them needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from flora.digests import digest_bytes, digest_json
from flora.forms import LINEAR, Form, Kind
from flora.names import Digest

if TYPE_CHECKING:
    from torch import Tensor

    from flora.lowrank import LowRank

SCHEMA_VERSION = 1
CHAT_TEMPLATE = "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"
EXTRAS = (CHAT_TEMPLATE, GENERATION_CONFIG)  # files of the tuned checkpoint that an adapter may carry


class Module(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One adapted module, as its header tells it. Defaults are not written: they came after the first digests."""

    name: str  # module path in the base checkpoint: model.layers.0.self_attn.q_proj
    in_features: int  # of the weight as a matrix [out, in]; `forms.py` says how it lies in the checkpoint
    out_features: int
    rank: int
    alpha: float  # scale = alpha / rank
    dtype: str  # of the stored factors: bfloat16, float16, float32, float8_e4m3fn
    a_sha256: str  # hex, of the stored bytes of A [rank, in] and B [out, rank]
    b_sha256: str
    kind: Kind = "linear"
    kernel: tuple[int, ...] = ()
    tied: tuple[str, ...] = ()
    experts: int = 0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def form(self) -> Form:
        return Form(kind=self.kind, kernel=self.kernel, tied=self.tied, experts=self.experts)


class ExactTensor(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A small tensor that the adapter carries whole, as the tuned checkpoint has it: a norm's weight, a bias.

    Or the rows from `first_row` on of a table that has grown: those of new tokens.
    """

    name: str  # in the base checkpoint: model.norm.weight
    shape: tuple[int, ...]
    dtype: str  # bfloat16, float16, float32
    sha256: str  # hex, of its bytes
    first_row: int | None = None


class TensorChange(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one tensor of the pair. Norms are squared Frobenius norms of the float32 delta."""

    name: str
    shape: tuple[int, ...]
    status: Literal["extracted", "exact", "unchanged", "not_extractable", "excluded"]  # exact: carried whole
    norm_squared: float
    kept: float = 0.0  # norm_squared less the squared residual of what is stored; 0 where nothing is
    rank: int | None = None
    noise: float = 0.0  # estimate of what rounding the tuned weights to their dtype put into norm_squared
    reason: str | None = None  # of a status other than extracted; or of a rank that missed the target
    changed_share: float | None = None  # of the tensor's elements; None where nobody counted
    signal_rank: int | None = None  # terms that stand out of noise (`flora.rank.signal_rank`); None: more than computed
    signal_energy: float = 0.0  # of those terms; where signal_rank is None, of all that were computed
    # What the first 1, 2, … rank terms keep; where fp8 stores them, too roughly to be summed up term by term
    kept_by_rank: tuple[float, ...] | msgspec.UnsetType = msgspec.UNSET


class ChangeReport(msgspec.Struct, frozen=True, kw_only=True):
    """Every tensor of the pair, in the order of names. Nothing is left out."""

    tensors: tuple[TensorChange, ...]

    @property
    def norm_squared(self) -> float:
        return sum(tensor.norm_squared for tensor in self.tensors)

    @property
    def kept_share(self) -> float:
        """Kept energy over the whole change, what was not extractable included; 1 if nothing changed."""
        total = self.norm_squared
        return sum(tensor.kept for tensor in self.tensors) / total if total else 1.0

    @property
    def extracted_share(self) -> float:
        """Kept energy over the extracted modules alone; 1 if there is none."""
        extracted = [tensor for tensor in self.tensors if tensor.status == "extracted"]
        total = sum(tensor.norm_squared for tensor in extracted)
        return sum(tensor.kept for tensor in extracted) / total if total else 1.0

    def share(self, tensor: TensorChange) -> float:
        """The tensor's share of the whole change."""
        return tensor.norm_squared / self.norm_squared if self.norm_squared else 0.0

    def by_name(self) -> dict[str, TensorChange]:
        return {tensor.name: tensor for tensor in self.tensors}


class BaseBinding(msgspec.Struct, frozen=True, kw_only=True):
    """The base an adapter belongs to. `base_id` is None only for an import whose base nobody has shown us."""

    name: str  # what the base calls itself; a Hub id where it has one. Never a path
    base_id: str | None
    architecture: str = "unknown"
    touched: dict[str, str] = {}  # sha256 (hex) of each base tensor that the factors change


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """How this version came to be: enough to make it again from the same inputs."""

    operation: Literal["extract", "prune", "import", "merge"]
    method: str = ""
    options: dict[str, str | int | float | bool | None] = {}
    tuned_name: str | None = None
    tuned_id: str | None = None  # digest of the tuned checkpoint's record
    parents: tuple[str, ...] = ()  # version digests


class AdapterHeader(msgspec.Struct, frozen=True, kw_only=True):
    """All of an adapter but the numbers: what a layout, a listing or a compatibility check needs."""

    base: BaseBinding
    modules: tuple[Module, ...]  # in the order of names; a module of rank 0 is absent
    recipe: Recipe
    extras: dict[str, str] = {}  # file name -> digest
    bench_salt: str = ""  # lets a benchmark make equal files count as different adapters
    schema_version: int = SCHEMA_VERSION
    exact: tuple[ExactTensor, ...] | msgspec.UnsetType = msgspec.UNSET  # in the order of names; not written if none

    @property
    def serving_digest(self) -> Digest:
        record = {
            "schema_version": self.schema_version,
            "base": self.base.base_id or f"claimed:{self.base.name}",
            "modules": [msgspec.to_builtins(module) for module in self.modules],
            "extras": self.extras,
            "bench_salt": self.bench_salt,
        }
        if self.exact_tensors:
            record["exact"] = [msgspec.to_builtins(tensor) for tensor in self.exact_tensors]
        return digest_json(record)

    @property
    def exact_tensors(self) -> tuple[ExactTensor, ...]:
        return self.exact or ()

    @property
    def first_rows(self) -> dict[str, int]:
        """Of the tables whose new rows alone are carried, the first of these, by name."""
        return {tensor.name: tensor.first_row for tensor in self.exact_tensors if tensor.first_row is not None}

    @property
    def forms(self) -> dict[str, Form]:
        """What each module is, by its name."""
        return {module.name: module.form for module in self.modules}

    @property
    def max_rank(self) -> int:
        return max((module.rank for module in self.modules), default=0)

    @property
    def num_parameters(self) -> int:
        return sum(module.rank * (module.in_features + module.out_features) for module in self.modules)


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter in memory: header, factors by module name, the report of its extraction, and what else it carries."""

    header: AdapterHeader
    factors: Mapping[str, LowRank]
    report: ChangeReport | None = None
    extras: Mapping[str, bytes] = field(default_factory=dict)  # files, by name
    exact: Mapping[str, Tensor] = field(default_factory=dict)  # whole tensors that replace the base's, by name

    def salted(self, salt: str) -> Adapter:
        """The same weights as an adapter of its own: for benchmarks, where equal files must count as different."""
        header = msgspec.structs.replace(self.header, bench_salt=salt)
        return replace(self, header=header)

    def __iter__(self) -> Iterator[tuple[Module, LowRank]]:
        for module in self.header.modules:
            yield module, self.factors[module.name]


def make_adapter(
    factors: Mapping[str, LowRank],
    base: BaseBinding,
    recipe: Recipe,
    report: ChangeReport | None = None,
    extras: Mapping[str, bytes] | None = None,
    bench_salt: str = "",
    *,
    forms: Mapping[str, Form] | None = None,
    exact: Mapping[str, Tensor] | None = None,
    first_rows: Mapping[str, int] | None = None,
) -> Adapter:
    """The adapter of these factors, with its header made from them. Modules of rank 0 are left out.

    forms  of the modules that are no linear layers;  exact  whole tensors to carry, fp32, fp16 or bf16 on the CPU
    first_rows  of those among `exact` that are only the new rows of a table
    """
    kept = {name: factors[name] for name in sorted(factors) if factors[name].rank > 0}
    extras = dict(extras or {})
    header = AdapterHeader(
        base=base,
        modules=tuple(describe(name, lowrank, (forms or {}).get(name, LINEAR)) for name, lowrank in kept.items()),
        recipe=recipe,
        extras={name: str(digest_bytes(data)) for name, data in sorted(extras.items())},
        bench_salt=bench_salt,
        exact=_describe_all(exact, first_rows or {}) if exact else msgspec.UNSET,
    )
    return Adapter(header=header, factors=kept, report=report, extras=extras, exact=dict(exact or {}))


def describe(name: str, factors: LowRank, form: Form = LINEAR) -> Module:
    """The header's line for factors A [rank, in] and B [out, rank], which have one dtype; hashes both."""
    return Module(
        name=name,
        in_features=factors.in_features,
        out_features=factors.out_features,
        rank=factors.rank,
        alpha=factors.scale * factors.rank,
        dtype=str(factors.A.dtype).removeprefix("torch."),
        a_sha256=tensor_sha256(factors.A),
        b_sha256=tensor_sha256(factors.B),
        kind=form.kind,
        kernel=form.kernel,
        tied=form.tied,
        experts=form.experts,
    )


def _describe_all(exact: Mapping[str, Tensor], first_rows: Mapping[str, int]) -> tuple[ExactTensor, ...]:
    return tuple(
        ExactTensor(
            name=name,
            shape=tuple(exact[name].shape),
            dtype=str(exact[name].dtype).removeprefix("torch."),
            sha256=tensor_sha256(exact[name]),
            first_row=first_rows.get(name),
        )
        for name in sorted(exact)
    )


def report_of_factors(factors: Mapping[str, LowRank]) -> ChangeReport:
    """The report of an adapter that has no known delta behind it, an import: the factors themselves are the change."""
    from flora.lowrank import norm_squared

    # a sum whose terms cancel out may come out of float64 just below 0
    norms = {name: max(norm_squared(factors[name]), 0.0) for name in sorted(factors)}
    return ChangeReport(
        tensors=tuple(
            TensorChange(
                name=f"{name}.weight",
                shape=(factors[name].out_features, factors[name].in_features),
                status="extracted",
                norm_squared=norm,
                kept=norm,
                rank=factors[name].rank,
            )
            for name, norm in norms.items()
        )
    )


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 (hex) of the tensor's bytes, row-major and little-endian."""
    import torch

    return digest_bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hex


def to_json(record: msgspec.Struct) -> Any:
    """The record as plain JSON values, ready for canonical JSON or a file."""
    return msgspec.to_builtins(record)
