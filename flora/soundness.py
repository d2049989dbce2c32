"""Whether a header and a report can be true at all: a digest proves only that they are what their author wrote.

They come from strangers, and code further in goes by them: it divides by ranks, makes a name for each expert, and holds
kept shares against bounds. So each field is held against its own range first. What the numbers claim stays a claim:
`flora verify` recomputes it.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import msgspec

from flora.adapter import EXTRAS, SCHEMA_VERSION, AdapterHeader, ChangeReport, ExactTensor, Module, Recipe, TensorChange
from flora.errors import AdapterInvalid
from flora.forms import EXPERT_KINDS, is_expert, split_expert

MAX_EXPERTS = 1 << 18  # of all layers and matrices, each of which gets a name: three times those of the largest models
TOLERANCE = 0.01  # of a norm: what rounding to fp8, and sums in float32, put into kept energy
_WHOLE_DTYPES = ("bfloat16", "float16", "float32")
_FACTOR_DTYPES = (*_WHOLE_DTYPES, "float8_e4m3fn")
_MAX_KERNEL = 3  # dimensions of a convolution
_HEX = re.compile(r"[0-9a-f]{64}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_HEX_DIGITS, _PLAIN = "64 lower-case hexadecimal digits", "free of control characters"
_MAY_LOSE = ("merge", "prune")  # PEFT's linear can be further from the sum than nothing is; a cut of it, too

_Fault = tuple[str, object, str]  # the field, its value, what that must be


def check_header(header: AdapterHeader, where: str, fix: str | None = None) -> None:
    """Returns if every field is in its range, and module names and forms go together.

    where  the file or record it comes from, for the message.   Raises AdapterInvalid, with the `field`.
    """
    _refuse(_header_faults(header), where, "header", fix)


def check_report(report: ChangeReport, operation: str, where: str, fix: str | None = None) -> None:
    """Returns if every figure is finite and in its range: no norm below 0, and no more kept than there was.

    operation  that made the adapter: a merge can keep less than nothing of what was asked, as can a whole tensor in a
               narrower dtype
    Raises AdapterInvalid, with the `field`.
    """
    _refuse(_report_faults(report, operation), where, "report", fix)


def _refuse(faults: Iterable[_Fault], where: str, part: str, fix: str | None) -> None:
    for field, value, must in faults:
        path = f"{part}.{field}"
        raise AdapterInvalid(
            f"{where} has {path} = {repr(value)[:80]}, which must be {must}",
            cause="it was damaged or edited: nothing that Flora writes is so",
            fix=fix,
            field=path,
        )


def _header_faults(header: AdapterHeader) -> Iterator[_Fault]:
    if not 1 <= header.schema_version <= SCHEMA_VERSION:
        yield "schema_version", header.schema_version, f"from 1 to {SCHEMA_VERSION}; a newer Flora may read it"
    base = header.base
    yield from _digest_fault("base.base_id", base.base_id)
    yield from _text_faults({"base.name": base.name, "base.architecture": base.architecture})
    for name, sha256 in base.touched.items():
        yield from _hex_fault(f"base.touched[{name[:80]!r}]", sha256)
    yield from _modules_faults(header.modules)
    yield from _twice_fault("modules", [module.name for module in header.modules])
    yield from _expert_fault(header.modules)
    for index, tensor in enumerate(header.exact_tensors):
        for field, value, must in _exact_faults(tensor):
            yield f"exact[{index}].{field}", value, must
    yield from _twice_fault("exact", [tensor.name for tensor in header.exact_tensors])
    for name, digest in header.extras.items():
        if name not in EXTRAS:
            yield "extras", name, f"one of {', '.join(EXTRAS)}"
        yield from _digest_fault(f"extras[{name[:80]!r}]", digest)
    yield from _text_faults({"bench_salt": header.bench_salt})
    yield from _recipe_faults(header.recipe)


def _modules_faults(modules: Iterable[Module]) -> Iterator[_Fault]:
    """In one loop: headers of experts have tens of thousands, and each load of one comes here."""
    for index, module in enumerate(modules):
        at = f"modules[{index}]"
        if not module.name or _CONTROL.search(module.name):
            yield f"{at}.name", module.name, "a module's path"
        if module.rank < 1 or module.in_features < 1 or module.out_features < 1:
            field = next(field for field in ("rank", "in_features", "out_features") if getattr(module, field) < 1)
            yield f"{at}.{field}", getattr(module, field), "1 or more"
        if not 0 < module.alpha < math.inf:
            yield f"{at}.alpha", module.alpha, "finite and above 0"
        if module.dtype not in _FACTOR_DTYPES:
            yield f"{at}.dtype", module.dtype, f"one of {', '.join(_FACTOR_DTYPES)}"
        if not _HEX.fullmatch(module.a_sha256):
            yield f"{at}.a_sha256", module.a_sha256, _HEX_DIGITS
        if not _HEX.fullmatch(module.b_sha256):
            yield f"{at}.b_sha256", module.b_sha256, _HEX_DIGITS
        if module.kind != "linear" or module.kernel or module.tied or module.experts:
            for field, value, must in _form_faults(module):
                yield f"{at}.{field}", value, must


def _form_faults(module: Module) -> Iterator[_Fault]:
    """What the module says of its layer that cannot be so."""
    kernel = module.kernel
    if module.kind != "conv" and kernel:
        yield "kernel", kernel, f"absent: a layer of kind {module.kind} has none"
    elif module.kind == "conv" and not (
        1 <= len(kernel) <= _MAX_KERNEL and min(kernel) >= 1 and module.in_features % math.prod(kernel) == 0
    ):
        yield "kernel", kernel, f"1 to {_MAX_KERNEL} sizes whose product divides in_features, {module.in_features}"
    if module.tied and module.kind != "embedding":
        yield "tied", module.tied, f"absent: a layer of kind {module.kind} shares its weight with no other"
    is_one = is_expert(module.name)
    if module.kind in EXPERT_KINDS and not is_one:
        yield "kind", module.kind, "another: this name is not that of an expert, M.experts.N.LEAF"
    elif module.experts and not is_one:
        yield "experts", module.experts, "absent: this name is not that of an expert, M.experts.N.LEAF"
    elif (module.experts or module.kind in EXPERT_KINDS) and not (
        split_expert(module.name)[1] < module.experts <= MAX_EXPERTS
    ):
        yield "experts", module.experts, f"above the expert's own number, and {MAX_EXPERTS} at most"


def _expert_fault(modules: Iterable[Module]) -> Iterator[_Fault]:
    """The experts of all layers, where each has every matrix that any of them has: a stack names them all."""
    homes: dict[str, int] = {}
    leaves = set()
    for module in modules:
        if module.experts and is_expert(module.name):
            parent, _, leaf = split_expert(module.name)
            homes[parent] = max(homes.get(parent, 0), module.experts)
            leaves.add(leaf)
    if (total := sum(homes.values()) * len(leaves)) > MAX_EXPERTS:
        yield "modules[…].experts", total, f"{MAX_EXPERTS} at most, over all layers and matrices"


def _exact_faults(tensor: ExactTensor) -> Iterator[_Fault]:
    if not tensor.name or _CONTROL.search(tensor.name):
        yield "name", tensor.name, "a tensor's name"
    if any(size < 0 for size in tensor.shape):
        yield "shape", tensor.shape, "sizes of 0 or more"
    if tensor.dtype not in _WHOLE_DTYPES:
        yield "dtype", tensor.dtype, f"one of {', '.join(_WHOLE_DTYPES)}"
    yield from _hex_fault("sha256", tensor.sha256)
    if tensor.first_row is not None and (tensor.first_row < 0 or not tensor.shape):
        yield "first_row", tensor.first_row, "absent, or 0 or more beside a shape that has rows"


def _recipe_faults(recipe: Recipe) -> Iterator[_Fault]:
    yield from _digest_fault("recipe.tuned_id", recipe.tuned_id)
    for index, parent in enumerate(recipe.parents):
        yield from _digest_fault(f"recipe.parents[{index}]", parent)
    yield from _text_faults({"recipe.method": recipe.method, "recipe.tuned_name": recipe.tuned_name or ""})
    for name, value in recipe.options.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield f"recipe.options[{name[:80]!r}]", value, "finite"


def _report_faults(report: ChangeReport, operation: str) -> Iterator[_Fault]:
    for index, tensor in enumerate(report.tensors):
        # a float64 norm that is carried in float32 may lose more by that than it had changed
        may_lose = operation in _MAY_LOSE or tensor.status == "exact"
        for field, value, must in _change_faults(tensor, may_lose=may_lose):
            yield f"tensors[{index}].{field}", value, must
    yield from _twice_fault("tensors", [tensor.name for tensor in report.tensors])
    if not math.isfinite(report.norm_squared):
        yield "tensors[…].norm_squared", report.norm_squared, "finite in sum"


def _change_faults(tensor: TensorChange, *, may_lose: bool) -> Iterator[_Fault]:
    norm, whole = tensor.norm_squared, (1 + TOLERANCE) * tensor.norm_squared
    is_stored = tensor.status in ("extracted", "exact")
    if not 0 <= norm < math.inf:
        yield "norm_squared", norm, "finite, and 0 or more"
    if not is_stored and tensor.kept != 0:
        yield "kept", tensor.kept, f"0: a tensor that is {tensor.status.replace('_', ' ')} is not stored"
    if not (-math.inf if may_lose else -TOLERANCE * norm) <= tensor.kept <= whole or math.isinf(tensor.kept):
        yield "kept", tensor.kept, f"from 0 to its norm_squared, {norm:g}"
    if tensor.kept_by_rank is not msgspec.UNSET:
        yield from _kept_by_rank_faults(tensor, tensor.kept_by_rank)
    if not 0 <= tensor.noise < math.inf:
        yield "noise", tensor.noise, "finite, and 0 or more"
    if not 0 <= tensor.signal_energy < math.inf:  # of an estimated spectrum, which may sum up to more than the norm
        yield "signal_energy", tensor.signal_energy, "finite, and 0 or more"
    if tensor.changed_share is not None and not 0 <= tensor.changed_share <= 1:
        yield "changed_share", tensor.changed_share, "from 0 to 1"
    if (tensor.rank or 0) < 0:
        yield "rank", tensor.rank, "0 or more"
    if (tensor.signal_rank or 0) < 0:
        yield "signal_rank", tensor.signal_rank, "0 or more"
    if tensor.shape and min(tensor.shape) < 0:
        yield "shape", tensor.shape, "sizes of 0 or more"
    if _CONTROL.search(tensor.name):
        yield "name", tensor.name, _PLAIN
    if tensor.reason is not None and _CONTROL.search(tensor.reason):
        yield "reason", tensor.reason, _PLAIN


def _kept_by_rank_faults(tensor: TensorChange, kept: tuple[float, ...]) -> Iterator[_Fault]:
    whole = (1 + TOLERANCE) * tensor.norm_squared
    if len(kept) != (tensor.rank or 0):
        yield "kept_by_rank", f"of {len(kept)} terms", f"of {tensor.rank or 0}, its rank"
    elif kept and kept[-1] != tensor.kept:
        yield "kept_by_rank", kept[-1], f"{tensor.kept:g} in the end, which all terms keep"
    for energy in kept:
        if not -math.inf < energy <= whole:
            yield "kept_by_rank", energy, f"up to its norm_squared, {tensor.norm_squared:g}"


def _digest_fault(field: str, value: str | None) -> Iterator[_Fault]:
    if value is not None and not _DIGEST.fullmatch(value):
        yield field, value, "sha256: and 64 lower-case hexadecimal digits"


def _hex_fault(field: str, value: str) -> Iterator[_Fault]:
    if not _HEX.fullmatch(value):
        yield field, value, _HEX_DIGITS


def _text_faults(texts: dict[str, str]) -> Iterator[_Fault]:
    for field, value in texts.items():
        if _CONTROL.search(value):
            yield field, value, _PLAIN


def _twice_fault(field: str, names: list[str]) -> Iterator[_Fault]:
    if len(set(names)) < len(names):
        yield f"{field}[…].name", Counter(names).most_common(1)[0][0], "there once"
