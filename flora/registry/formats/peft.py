"""PEFT folders: an adapter as any engine reads it, with Flora's record beside it in flora.json.

    adapter_config.json, adapter_model.safetensors    PEFT's own
    flora.json                                        header and report: what PEFT has no place for
    chat_template.jinja, generation_config.json       where the tuned model's differ from the base's

A folder with a flora.json comes back as the adapter that was saved, with its digests; any other is an import.
"""

import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from flora.adapter import (
    EXTRAS,
    Adapter,
    AdapterHeader,
    BaseBinding,
    ChangeReport,
    Module,
    Recipe,
    make_adapter,
    report_of_factors,
    tensor_sha256,
    to_json,
)
from flora.canonical import indented_json
from flora.digests import digest_bytes
from flora.errors import AdapterInvalid, NotFound, UsageError
from flora.forms import EXPERT_KINDS, LINEAR, Form
from flora.registry.disk import store_error
from flora.registry.formats.padding import portable_rank
from flora.registry.formats.paths import rename, rename_tensor
from flora.registry.formats.peft_config import (
    CONFIG_FILE,
    LoraScales,
    make_config,
    public_name,
    read_config,
    read_json,
)
from flora.registry.formats.peft_weights import WEIGHTS_FILE, Weights, adapted_modules, find_weights, read_weights
from flora.registry.formats.spelling import spell, spell_exact, spell_tied
from flora.registry.formats.stacks import Stack, members_of, spell_stack, stacks_of
from flora.registry.formats.targets import find_targets
from flora.registry.formats.tensors import encode
from flora.soundness import check_header, check_report

if TYPE_CHECKING:
    from torch import Tensor

    from flora.lowrank import LowRank

Profile = Literal["compact", "portable"]

RECORD_FILE = "flora.json"
CARD_FILE = "README.md"
OUR_FILES = {CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE, CARD_FILE, *EXTRAS}
_KIND = "flora.peft"
_LIKE_LINEAR = ("conv1d", "parameter", *EXPERT_KINDS)  # PEFT's tensors do not tell these from linear layers
_SCHEMA_VERSION = 1
_MAX_EXTRA_BYTES = 1 << 20
_FETCH_OR_IMPORT = f"fetch it again; or delete {RECORD_FILE} to import what is there, without its record"


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    """flora.json."""

    kind: str
    schema_version: int
    profile: Profile
    serving_digest: str
    header: AdapterHeader
    report: ChangeReport | None
    paths: dict[str, str] = {}  # of modules that have another name in the folder than in the header


def save_peft(
    adapter: Adapter, folder: Path, profile: Profile = "compact", paths: Mapping[str, str] | None = None
) -> list[Path]:
    """Writes the adapter to `folder`, whole or not at all, and returns its files.

    compact   true per-module ranks, in rank_pattern and alpha_pattern
    portable  one rank, zero-padded, and zeros where an engine would miss a module: `padding.py`
    paths     of modules that the loading library names otherwise: `paths.tree_paths`

    A folder that Flora wrote is replaced. Raises UsageError if anything else is there, StoreError.
    """
    folder = folder.absolute()
    check_replaceable(folder)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        for name, pieces in peft_files(adapter, profile, paths).items():
            with (temporary / name).open("wb") as file:
                file.writelines(pieces)
        _replace(temporary, folder)
    except OSError as error:
        raise store_error(f"{folder} cannot be written", error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sorted(path for path in folder.iterdir() if path.name in OUR_FILES)


def peft_files(
    adapter: Adapter, profile: Profile, paths: Mapping[str, str] | None = None
) -> dict[str, Iterable[bytes | memoryview]]:
    """The files of the folder, by name, each as pieces."""
    if any(".experts." in module.name or module.kind == "parameter" for module, _ in adapter):
        # PEFT stacks the experts of a layer: all must be there, and of one rank; and finds no pattern for a parameter
        profile = "portable"
    if profile == "portable":
        from flora.registry.formats.portable import fold_scales, pad_forms, pad_portable

        adapter = fold_scales(adapter)
    header = adapter.header
    adapter = _renamed(adapter, paths or {})
    if profile == "portable":
        factors: Mapping[str, LowRank] = pad_portable(adapter, paths)
        forms = pad_forms(adapter, factors)
        config = make_config(adapter.header, [])
        rank = portable_rank(adapter.header)
        config |= {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}}
        config |= find_targets(adapter, forms, short=True)
    else:
        factors, forms = adapter.factors, adapter.header.forms
        config = make_config(adapter.header, []) | find_targets(adapter, forms)
    record = _Record(
        kind=_KIND,
        schema_version=_SCHEMA_VERSION,
        profile=profile,
        serving_digest=str(header.serving_digest),
        header=header,
        report=adapter.report,
        paths=dict(paths or {}),
    )
    files: dict[str, Iterable[bytes | memoryview]] = {
        CONFIG_FILE: [indented_json(config)],
        WEIGHTS_FILE: encode(_spell_all(adapter, factors, forms)),
        RECORD_FILE: [indented_json(to_json(record))],
    }
    return files | {name: [data] for name, data in adapter.extras.items() if name in EXTRAS}


def _renamed(adapter: Adapter, paths: Mapping[str, str]) -> Adapter:
    if not paths:
        return adapter
    factors = {paths.get(name, name): lowrank for name, lowrank in adapter.factors.items()}
    exact = {rename_tensor(name, paths): tensor for name, tensor in adapter.exact.items()}
    return replace(adapter, header=rename(adapter.header, paths), factors=factors, exact=exact)


def _wraps(forms: Mapping[str, Form], stacks: Sequence[Stack]) -> dict[str, int]:
    """How many layers PEFT puts around each module that it adapts."""
    once = dict.fromkeys((name for module, form in forms.items() for name in (module, *form.tied)), 1)
    return once | Counter(stack.parameter.rpartition(".")[0] for stack in stacks)


def _spell_all(adapter: Adapter, factors: Mapping[str, "LowRank"], forms: Mapping[str, Form]) -> dict[str, "Tensor"]:
    """Every tensor of the folder; an embedding's factors again for each module that shares its weight."""
    stacks = stacks_of(adapter.header.forms, adapter.header.base.architecture)
    wraps = _wraps({name: forms[name] for name in factors}, stacks)
    tensors = {spell_exact(told, wraps): adapter.exact[told.name] for told in adapter.header.exact_tensors}
    stacked = members_of(stacks)
    for name, lowrank in factors.items():
        if name not in stacked:
            tensors |= spell(name, lowrank, forms[name])
    for stack in stacks:
        tensors |= spell_stack(stack, factors)
    return tensors | spell_tied(factors, forms)


def load_peft(folder: Path) -> Adapter:
    """The adapter in `folder`: with its header, report and digests if Flora wrote it, else imported as it stands.

    Raises NotFound, PickleRefused (never opened), AdapterInvalid and Unsupported (with the key or tensor), NotFinite.
    """
    if not folder.is_dir():
        raise NotFound(f"{folder} is not a folder", fix=f"give the folder that holds {CONFIG_FILE}")
    weights = find_weights(folder)
    if (folder / RECORD_FILE).exists():
        record = _read_record(folder)
        config = LoraScales(read_config(folder / CONFIG_FILE, own=True))
        header = _renamed_header(record)
        stacks = stacks_of(header.forms, header.base.architecture)
        # a portable one adds layers, whose bias may be among the exact tensors
        wraps = dict.fromkeys(adapted_modules(weights), 1) | _wraps(header.forms, stacks)
        exact = {tensor.name: spell_exact(tensor, wraps) for tensor in header.exact_tensors}
        adapter = _load_own(folder, header, record.report, config, read_weights(weights, config, exact, stacks))
        back = {path: name for name, path in record.paths.items()}
        return replace(_renamed(adapter, back), header=record.header)
    config = LoraScales(read_config(folder / CONFIG_FILE))
    return _import(folder, config, read_weights(weights, config))


def _import(folder: Path, config: LoraScales, weights: Weights) -> Adapter:
    base = BaseBinding(name=public_name(config.config.base_model_name_or_path), base_id=None)
    version = config.config.peft_version
    recipe = Recipe(operation="import", method="peft", options={"peft_version": version} if version else {})
    extras = {name: _read_extra(folder / name) for name in EXTRAS if (folder / name).exists()}
    return make_adapter(weights.pairs, base, recipe, report_of_factors(weights.pairs), extras, forms=weights.forms)


def _read_record(folder: Path) -> _Record:
    try:
        record = msgspec.convert(read_json(folder / RECORD_FILE), _Record)
    except msgspec.ValidationError as error:
        raise AdapterInvalid(f"{RECORD_FILE} is not a record of Flora's", cause=str(error)[:300]) from error
    if record.kind != _KIND or record.schema_version > _SCHEMA_VERSION:
        raise AdapterInvalid(
            f"{RECORD_FILE} has kind {record.kind[:40]!r} and schema {record.schema_version}",
            cause=f"this Flora reads {_KIND!r} up to schema {_SCHEMA_VERSION}",
            fix="upgrade Flora: pip install -U flora-adapters",
        )
    if str(record.header.serving_digest) != record.serving_digest:
        raise _differs("the header")
    if not record.header.base.name.isprintable():
        raise AdapterInvalid(f"{RECORD_FILE} names its base with characters that cannot be shown")
    check_header(record.header, RECORD_FILE, _FETCH_OR_IMPORT)
    if record.report is not None:
        check_report(record.report, record.header.recipe.operation, RECORD_FILE, _FETCH_OR_IMPORT)
    return record


def _renamed_header(record: _Record) -> AdapterHeader:
    """The header with the folder's names of its modules, which are a stranger's word as well."""
    header = rename(record.header, record.paths)
    if record.paths:
        check_header(header, f"{RECORD_FILE}, its modules named by its `paths`,", _FETCH_OR_IMPORT)
    return header


def _load_own(
    folder: Path, header: AdapterHeader, report: ChangeReport | None, config: LoraScales, weights: Weights
) -> Adapter:
    """The adapter of a folder that Flora wrote, with the padding of a portable one trimmed away again."""
    import torch

    from flora.lowrank import trim

    left = dict(weights.pairs)
    factors = {}
    for module in header.modules:
        whole = left.pop(module.name, None)
        if whole is None or module.rank > whole.rank or module.scale != config.scale(module.name):
            raise _differs(module.name)
        _check_told(module, whole, weights.forms.get(module.name, LINEAR))
        padding_is_zero = not whole.A[module.rank :].any() and not whole.B[:, module.rank :].any()
        trimmed = trim(whole, module.rank)
        hashes = (tensor_sha256(trimmed.A), tensor_sha256(trimmed.B))
        if not padding_is_zero or hashes != (module.a_sha256, module.b_sha256):
            raise _differs(module.name)
        factors[module.name] = trimmed
        for tied in module.tied:
            again = left.pop(tied, None)
            if again is None or not (torch.equal(again.A, whole.A) and torch.equal(again.B, whole.B)):
                raise _differs(tied)
    for name, whole in left.items():
        if whole.A.any() or whole.B.any():
            raise _differs(name)
    extras = {name: _own_extra(folder, name, digest) for name, digest in header.extras.items()}
    for tensor in header.exact_tensors:
        stored = weights.exact[tensor.name]
        _refuse_other(tensor.name, "dtype", tensor.dtype, _dtype(stored))
        _refuse_other(tensor.name, "shape", tensor.shape, tuple(stored.shape))
        if tensor_sha256(stored) != tensor.sha256:
            raise _differs(tensor.name)
    return Adapter(header=header, factors=factors, report=report, extras=extras, exact=weights.exact)


def _check_told(module: Module, whole: "LowRank", form: Form) -> None:
    """Raises AdapterInvalid if the header tells of the module what its tensors do not, or not what they do."""
    if not (form.kind == "linear" and module.kind in _LIKE_LINEAR):
        _refuse_other(module.name, "kind", module.kind, form.kind)
        _refuse_other(module.name, "kernel", module.kernel, form.kernel)
    _refuse_other(module.name, "dtype", module.dtype, _dtype(whole.A))
    _refuse_other(module.name, "in_features", module.in_features, whole.in_features)
    _refuse_other(module.name, "out_features", module.out_features, whole.out_features)


def _refuse_other(name: str, field: str, told: object, found: object) -> None:
    if told != found:
        raise _differs(name, f"its {field} is {found!r} in {WEIGHTS_FILE}, and {told!r} in {RECORD_FILE}", field)


def _dtype(tensor: "Tensor") -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _own_extra(folder: Path, name: str, digest: str) -> bytes:
    if name not in EXTRAS or not (folder / name).is_file():
        raise AdapterInvalid(f"{RECORD_FILE} names {name[:80]!r}, which is not a file here")
    data = _read_extra(folder / name)
    if str(digest_bytes(data)) != digest:
        raise _differs(name)
    return data


def _differs(name: str, how: str | None = None, field: str | None = None) -> AdapterInvalid:
    return AdapterInvalid(
        f"{name} is not what {RECORD_FILE} says" + (f": {how}" if how else ""),
        cause="the folder was changed after Flora wrote it",
        fix=_FETCH_OR_IMPORT,
        tensor=name,
        field=field,
    )


def _read_extra(path: Path) -> bytes:
    if path.stat().st_size > _MAX_EXTRA_BYTES:
        raise AdapterInvalid(f"{path.name} has more than {_MAX_EXTRA_BYTES >> 20} MiB")
    return path.read_bytes()


def check_replaceable(folder: Path) -> None:
    """Raises UsageError if `save_peft` would refuse to write there."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file", fix="give --out a new folder")
    names = {path.name for path in folder.iterdir()}
    if names and (RECORD_FILE not in names or not names <= OUR_FILES):
        stranger = min(names - OUR_FILES, default=min(names))
        raise UsageError(f"{folder} holds {stranger}, which Flora did not write there", fix="give --out a new folder")


def _replace(temporary: Path, folder: Path) -> None:
    """Puts the new folder in the place of the old one."""
    if not folder.exists():
        os.rename(temporary, folder)
        return
    aside = folder.parent / f"{temporary.name}.old"
    os.rename(folder, aside)
    os.rename(temporary, folder)
    shutil.rmtree(aside, ignore_errors=True)
