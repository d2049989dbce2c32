"""Folders that somebody changed: what they were comes out, or an error of ours that names what is wrong.

A digest keeps nobody from editing flora.json: its author can always compute it anew, and so do these tests.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flora.adapter import Adapter, AdapterHeader, Recipe, make_adapter, report_of_factors
from flora.errors import AdapterInvalid, FloraError
from flora.forms import Form
from flora.lowrank import LowRank
from flora.registry import Registry
from flora.registry.formats.peft import load_peft, save_peft
from flora.registry.remotes.pulling import pull
from tests.registry.adapters import BASE, Q_PROJ, UP_PROJ, random_adapter

FILES = ["adapter_config.json", "adapter_model.safetensors", "flora.json"]
DOWN = "model.layers.0.mlp.experts.{}.down_proj"
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=5,
)
fuzzed = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "sound"
    save_peft(random_adapter(), path)
    return path


@pytest.fixture(scope="module")
def convolution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "convolution"
    save_peft(_adapter({"conv": Form(kind="conv", kernel=(2, 3))}), path)
    return path


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "experts"
    save_peft(_adapter({DOWN.format(index): Form(kind="expert", experts=4) for index in range(4)}), path)
    return path


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "vectors"
    save_peft(_adapter({Q_PROJ: Form()}, exact={"model.norm.weight": torch.ones(4)}), path)
    return path


def _adapter(forms: dict[str, Form], **more: Any) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    factors = {
        name: LowRank(A=torch.randn(2, 12, generator=generator), B=torch.randn(8, 2, generator=generator))
        for name in forms
    }
    return make_adapter(factors, BASE, Recipe(operation="extract"), report_of_factors(factors), forms=forms, **more)


def load_with(folder: Path, **changed: bytes) -> Adapter | None:
    """The adapter in a copy of the folder whose files have other bytes, or for b"" are missing; None if refused."""
    copy = folder.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    for name, data in changed.items():
        (copy / name).write_bytes(data) if data else (copy / name).unlink()
    try:
        adapter = load_peft(copy)
    except FloraError:
        return None
    assert adapter.header.modules
    assert all(bool(factors.A.isfinite().all()) for factors in adapter.factors.values())
    return adapter


def signed(document: dict[str, Any]) -> bytes:
    """The document as flora.json, with the serving digest that its header has now, if that is a header at all."""
    with contextlib.suppress(msgspec.ValidationError, AdapterInvalid, KeyError, TypeError, UnicodeEncodeError):
        document["serving_digest"] = str(msgspec.convert(document["header"], AdapterHeader).serving_digest)
    return json.dumps(document).encode()


def edited(folder: Path, copy: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the folder whose flora.json was edited and signed again."""
    shutil.copytree(folder, copy)
    document = json.loads((folder / "flora.json").read_bytes())
    edit(document)
    (copy / "flora.json").write_bytes(signed(document))
    return copy


def module(**fields: object) -> Callable[[dict[str, Any]], object]:
    return lambda document: document["header"]["modules"][0].update(fields)


def header(part: str, **fields: object) -> Callable[[dict[str, Any]], object]:
    return lambda document: document["header"][part].update(fields)


def tensor(**fields: object) -> Callable[[dict[str, Any]], object]:
    return lambda document: document["report"]["tensors"][0].update(fields)


def exact(**fields: object) -> Callable[[dict[str, Any]], object]:
    return lambda document: document["header"]["exact"][0].update(fields)


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (module(rank=0), "header.modules[0].rank"),
        (module(rank=-4), "header.modules[0].rank"),
        (module(in_features=0), "header.modules[0].in_features"),
        (module(out_features=-1), "header.modules[0].out_features"),
        (module(in_features=5), "in_features"),
        (module(out_features=5), "out_features"),
        (module(alpha=0), "header.modules[0].alpha"),
        (module(alpha=-1.0), "header.modules[0].alpha"),
        (module(dtype="int3"), "header.modules[0].dtype"),
        (module(dtype="float64"), "header.modules[0].dtype"),
        (module(dtype="float16"), "dtype"),
        (module(a_sha256="0" * 63), "header.modules[0].a_sha256"),
        (module(b_sha256="B" * 64), "header.modules[0].b_sha256"),
        (module(name=""), "header.modules[0].name"),
        (module(name="q\x1b[31m"), "header.modules[0].name"),
        (module(kind="embedding"), "kind"),
        (module(kind="conv", kernel=[4, 4]), "kind"),
        (module(kind="conv"), "header.modules[0].kernel"),
        (module(kind="conv", kernel=[0]), "header.modules[0].kernel"),
        (module(kind="conv", kernel=[5]), "header.modules[0].kernel"),
        (module(kind="conv", kernel=[1] * 4), "header.modules[0].kernel"),
        (module(kernel=[3, 3]), "header.modules[0].kernel"),
        (module(tied=["lm_head"]), "header.modules[0].tied"),
        (module(kind="expert", experts=4), "header.modules[0].kind"),
        (module(kind="expert_transposed"), "header.modules[0].kind"),
        (module(experts=4), "header.modules[0].experts"),
        (module(experts=-1), "header.modules[0].experts"),
        (module(name=DOWN.format(0), kind="expert"), "header.modules[0].experts"),
        (module(name=DOWN.format(4), kind="expert", experts=4), "header.modules[0].experts"),
        (module(name=DOWN.format(0), kind="expert", experts=10**8), "header.modules[0].experts"),
        (module(name=DOWN.format(0), experts=10**8), "header.modules[0].experts"),
        (module(name=UP_PROJ), "header.modules[…].name"),
        (header("base", base_id="anything \x1b[31m"), "header.base.base_id"),
        (header("base", base_id=""), "header.base.base_id"),
        (header("base", base_id="sha256:" + "B" * 64), "header.base.base_id"),
        (header("base", architecture="x\x07"), "header.base.architecture"),
        (header("base", touched={"w": "../w"}), "header.base.touched['w']"),
        (header("recipe", tuned_name="\x1b]0;owned\x07"), "header.recipe.tuned_name"),
        (header("recipe", method="\x00"), "header.recipe.method"),
        (header("recipe", tuned_id="../../etc"), "header.recipe.tuned_id"),
        (header("recipe", parents=["v1"]), "header.recipe.parents[0]"),
        (header("extras", **{"../../etc/passwd": "sha256:" + "0" * 64}), "header.extras"),
        (header("extras", **{"chat_template.jinja": "0"}), "header.extras['chat_template.jinja']"),
        (lambda document: document["header"].update(schema_version=0), "header.schema_version"),
        (lambda document: document["header"].update(schema_version=2), "header.schema_version"),
        (lambda document: document["header"].update(bench_salt="\x9b"), "header.bench_salt"),
        (tensor(norm_squared=-1.0, kept=5.0), "report.tensors[0].norm_squared"),
        (tensor(norm_squared=1.0, kept=99.0), "report.tensors[0].kept"),
        (tensor(norm_squared=1.0, kept=1.02), "report.tensors[0].kept"),
        (tensor(norm_squared=1.0, kept=1e300, shape=[]), "report.tensors[0].kept"),
        (tensor(norm_squared=1.0, kept=-5.0), "report.tensors[0].kept"),
        (tensor(norm_squared=0.0, kept=1e-9), "report.tensors[0].kept"),
        (tensor(norm_squared=1.0, kept=1.0, status="excluded"), "report.tensors[0].kept"),
        (tensor(noise=-1.0), "report.tensors[0].noise"),
        (tensor(signal_energy=-1.0), "report.tensors[0].signal_energy"),
        (tensor(rank=1, norm_squared=2.0, kept=1.0, kept_by_rank=[0.5, 1.0]), "report.tensors[0].kept_by_rank"),
        (tensor(rank=2, norm_squared=2.0, kept=1.0, kept_by_rank=[0.5, 0.9]), "report.tensors[0].kept_by_rank"),
        (tensor(rank=2, norm_squared=2.0, kept=1.0, kept_by_rank=[99.0, 1.0]), "report.tensors[0].kept_by_rank"),
        (tensor(changed_share=1.5), "report.tensors[0].changed_share"),
        (tensor(changed_share=-0.5), "report.tensors[0].changed_share"),
        (tensor(rank=-1), "report.tensors[0].rank"),
        (tensor(signal_rank=-1), "report.tensors[0].signal_rank"),
        (tensor(shape=[-1, 2]), "report.tensors[0].shape"),
        (tensor(name="w\x1b[2J"), "report.tensors[0].name"),
        (tensor(reason="\x1b[2J"), "report.tensors[0].reason"),
        (tensor(name=f"{UP_PROJ}.weight"), "report.tensors[…].name"),
        (
            lambda document: [each.update(norm_squared=1e308, kept=0) for each in document["report"]["tensors"]],
            "report.tensors[…].norm_squared",
        ),
    ],
)
def test_a_record_that_cannot_be_true_is_refused_though_its_digest_is_right(folder, tmp_path, edit, field):
    with pytest.raises(AdapterInvalid) as refused:
        load_peft(edited(folder, tmp_path / "copy", edit))

    assert refused.value.field == field
    assert "flora.json" in refused.value.what
    assert field.removeprefix("header.").removeprefix("report.") in refused.value.what
    assert "delete flora.json" in refused.value.fix
    assert refused.value.what.isprintable()


@pytest.mark.parametrize("number", ["1e999", "-1e999"])
@pytest.mark.parametrize("key", ["norm_squared", "kept", "noise", "signal_energy", "alpha"])
def test_a_number_that_overflows_is_refused_by_its_field(folder, tmp_path, key, number):
    edit = module(alpha=-0.125) if key == "alpha" else tensor(**{key: -0.125})
    copy = edited(folder, tmp_path / "copy", edit)
    text = (copy / "flora.json").read_text()
    (copy / "flora.json").write_text(text.replace("-0.125", number))

    with pytest.raises(AdapterInvalid) as refused:
        load_peft(copy)
    if key != "alpha":  # no digest is made of what JSON cannot keep
        assert refused.value.field == f"report.tensors[0].{key}"


@pytest.mark.parametrize(
    ("kernel", "field"), [([3, 2], "kernel"), ([6], "kernel"), ([2, 3, 1], "kernel"), ([], "header.modules[0].kernel")]
)
def test_another_kernel_than_the_tensors_have_is_refused(convolution, tmp_path, kernel, field):
    assert load_peft(convolution).header.modules[0].kernel == (2, 3)

    with pytest.raises(AdapterInvalid) as refused:
        load_peft(edited(convolution, tmp_path / "copy", module(kernel=kernel)))
    assert refused.value.field == field


def test_a_convolution_that_is_called_a_linear_layer_is_refused(convolution, tmp_path):
    def edit(document: dict[str, Any]) -> None:
        del document["header"]["modules"][0]["kernel"], document["header"]["modules"][0]["kind"]

    with pytest.raises(AdapterInvalid) as refused:
        load_peft(edited(convolution, tmp_path / "copy", edit))
    assert refused.value.field == "kind"


def test_experts_of_all_layers_together_are_bounded(experts, tmp_path):
    """Each number is one that a single layer could have."""

    def edit(document: dict[str, Any]) -> None:
        (first, *_) = document["header"]["modules"]
        document["header"]["modules"] = [
            first | {"name": f"model.layers.{layer}.mlp.experts.0.down_proj", "experts": 200_000} for layer in range(9)
        ]

    with pytest.raises(AdapterInvalid) as refused:
        load_peft(edited(experts, tmp_path / "copy", edit))
    assert refused.value.field == "header.modules[…].experts"


def test_another_number_of_experts_than_the_tensors_have_is_refused(experts, tmp_path):
    def edit(document: dict[str, Any]) -> None:
        for each in document["header"]["modules"]:
            each["experts"] = 8

    assert len(load_peft(experts).factors) == 4
    assert len(load_peft(edited(experts, tmp_path / "same", lambda document: None)).factors) == 4

    with pytest.raises(AdapterInvalid, match=r"down_proj"):
        load_peft(edited(experts, tmp_path / "copy", edit))


@pytest.mark.parametrize(
    "paths", [{DOWN.format(0): "plain"}, {DOWN.format(0): DOWN.format(1)}, {DOWN.format(3): DOWN.format(4)}]
)
def test_paths_that_make_other_modules_of_experts_are_refused(experts, tmp_path, paths):
    with pytest.raises(AdapterInvalid, match="paths"):
        load_peft(edited(experts, tmp_path / "copy", lambda document: document.update(paths=paths)))


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (exact(dtype="bfloat16"), "dtype"),
        (exact(dtype="float8_e4m3fn"), "header.exact[0].dtype"),
        (exact(shape=[2, 2]), "shape"),
        (exact(shape=[-4]), "header.exact[0].shape"),
        (exact(sha256="x"), "header.exact[0].sha256"),
        (exact(first_row=-1), "header.exact[0].first_row"),
        (exact(name="\x00"), "header.exact[0].name"),
    ],
)
def test_a_whole_tensor_that_is_told_otherwise_is_refused(vectors, tmp_path, edit, field):
    assert load_peft(vectors).exact.keys() == {"model.norm.weight"}

    with pytest.raises(AdapterInvalid) as refused:
        load_peft(edited(vectors, tmp_path / "copy", edit))
    assert refused.value.field == field


def test_what_is_refused_leaves_nothing_behind(folder, tmp_path):
    hostile = edited(folder, tmp_path / "copy", module(dtype="int3"))

    with pytest.raises(AdapterInvalid):
        pull(str(hostile), tmp_path / "staging")

    assert [path for path in (tmp_path / "staging").rglob("*") if path.suffix != ".lock"] == []


@fuzzed
@given(
    st.sampled_from(FILES),
    st.booleans(),
    st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=9)), min_size=1, max_size=4),
)
def test_any_bytes_may_change_in_any_file_and_no_factor_is_another_then(folder, name, is_import, edits):
    data = (folder / name).read_bytes()
    for place, replacement in edits:
        at = int(place * len(data))
        data = data[:at] + replacement + data[at + len(replacement) :]
    is_import = is_import and name != "flora.json"
    changed = {"flora.json": b""} if is_import else {}

    adapter = load_with(folder, **changed, **{name: data or b"\0"})

    if adapter is not None and not is_import:
        assert_same_weights(adapter)


@fuzzed
@given(st.data())
def test_any_value_of_the_config_may_stand_for_any_other(folder, data):
    document = json.loads((folder / FILES[0]).read_bytes())
    replace_a_value(document, data)

    adapter = load_with(folder, **{FILES[0]: json.dumps(document).encode()})

    if adapter is not None:
        assert_same_weights(adapter)


@fuzzed
@given(st.data())
def test_any_value_of_a_module_that_is_signed_anew_is_refused(folder, data):
    """But that a linear layer is another of those whose tensors look alike: only its base tells them apart."""
    document = json.loads((folder / "flora.json").read_bytes())
    field, was, value = replace_a_value(document["header"]["modules"], data)
    is_a_change = value != was and not (field == "kind" and value in ("conv1d", "parameter"))

    adapter = load_with(folder, **{"flora.json": signed(document)})

    assert adapter is None or not is_a_change


@fuzzed
@given(st.data())
def test_a_record_that_is_accepted_is_stored_and_comes_back(folder, tmp_path_factory, data):
    """Whatever stands in it, signed anew: what of it is a claim is within bounds, and nothing is kept that is lost."""
    document = json.loads((folder / "flora.json").read_bytes())
    replace_a_value(document, data)

    adapter = load_with(folder, **{"flora.json": signed(document)})

    if adapter is not None:
        assert_same_weights(adapter)
        with Registry.open(tmp_path_factory.mktemp("registry")) as registry:
            version = registry.add(adapter, "sql")
            assert registry.load(version).header == adapter.header
            assert version.kept_share is None or -0.01 <= version.kept_share <= 1.01


def replace_a_value(document: Any, data: st.DataObject) -> tuple[object, object, object]:
    """Puts anything in the place of something in the document, however deep: its key, what was there, what is."""
    at = document
    while True:
        key = data.draw(st.sampled_from(sorted(at)) if isinstance(at, dict) else st.integers(0, len(at) - 1))
        if not at[key] or not isinstance(at[key], (dict, list)) or data.draw(st.booleans()):
            break
        at = at[key]
    was, at[key] = at[key], data.draw(values)
    return key, was, at[key]


def assert_same_weights(adapter: Adapter) -> None:
    expected = random_adapter()
    assert adapter.factors.keys() == expected.factors.keys()
    for name, factors in adapter.factors.items():
        assert torch.equal(factors.A, expected.factors[name].A)
        assert torch.equal(factors.B, expected.factors[name].B)
        assert math.isclose(factors.scale, expected.factors[name].scale)


def test_an_integer_that_no_double_holds_is_refused_like_any_other_wrong_value(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    document = json.loads((folder / "flora.json").read_bytes())
    document["header"]["schema_version"] = 2**53
    (tmp_path / "copy" / "flora.json").write_bytes(json.dumps(document).encode())

    with pytest.raises(AdapterInvalid, match="JSON"):
        load_peft(tmp_path / "copy")


def test_what_is_loaded_does_not_change_with_the_file(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    adapter = load_peft(tmp_path / "copy")
    before = {name: factors.A.clone() for name, factors in adapter.factors.items()}

    weights = tmp_path / "copy" / FILES[1]
    with weights.open("r+b") as file:
        file.seek(-64, 2)
        file.write(b"\xff" * 64)

    assert all(torch.equal(adapter.factors[name].A, A) for name, A in before.items())
