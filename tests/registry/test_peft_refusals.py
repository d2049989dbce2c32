"""What is refused of a PEFT folder, by the field or tensor that is wrong, and without opening what could do harm."""

import pytest
import torch

from flora.adapter import CHAT_TEMPLATE
from flora.errors import AdapterInvalid, NotFinite, Unsupported
from flora.registry.formats.peft import load_peft, save_peft
from tests.registry.adapters import BASE, Q_PROJ, random_adapter
from tests.registry.peft_folders import A_KEY, CONFIG, RECORD, as_foreign, edit_config, edit_weights


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"peft_type": None}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"auto_mapping": {"base_model_class": "X", "parent_library": "evil"}}, "auto_mapping"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"use_something_new": True}, "use_something_new"),
    ],
)
def test_an_adapter_that_is_more_than_lora_is_refused_by_the_key_that_says_so(tmp_path, changes, field):
    foreign = as_foreign(tmp_path / "theirs")
    edit_config(foreign, **changes)

    with pytest.raises(Unsupported) as refused:
        load_peft(foreign)
    assert refused.value.field == field


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0},
        {"r": -1},
        {"r": 10**9},
        {"r": "4"},
        {"r": 4.5},
        {"lora_alpha": 0},
        {"lora_alpha": 1e308},
        {"lora_alpha": -2},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"(a+)+$": 4}},
        {"alpha_pattern": {"(.*)*": 4}},
        {"alpha_pattern": {"[": 4}},
        {"alpha_pattern": {".*.*.*.*x": 4}},
        {"target_modules": ["v_proj"]},
        {"target_modules": 3},
    ],
    ids=str,
)
def test_an_absurd_config_is_refused(tmp_path, changes):
    foreign = as_foreign(tmp_path / "theirs")
    edit_config(foreign, **changes)

    with pytest.raises(AdapterInvalid):
        load_peft(foreign)


def test_a_hostile_regular_expression_in_target_modules_is_never_run(tmp_path):
    foreign = as_foreign(tmp_path / "theirs")
    edit_config(foreign, target_modules="(a+)+$")

    assert len(load_peft(foreign).header.modules) == 2


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{",
        b"{" * 100_000,
        b"[" * 100_000,
        b'{"peft_type": "LORA", "r": NaN}',
        b'{"r": 1, "r": 2}',
        b"\xff\xfe",
    ],
    ids=["empty", "list", "cut", "deep objects", "deep lists", "NaN", "twice", "binary"],
)
def test_a_config_that_is_no_json_object_is_refused(tmp_path, text):
    foreign = as_foreign(tmp_path / "theirs")
    (foreign / CONFIG).write_bytes(text)

    with pytest.raises(AdapterInvalid, match="adapter_config"):
        load_peft(foreign)


def test_a_huge_config_is_refused_by_its_size_alone(tmp_path):
    foreign = as_foreign(tmp_path / "theirs")
    with (foreign / CONFIG).open("wb") as file:
        file.truncate(1 << 40)  # sparse

    with pytest.raises(AdapterInvalid, match="MiB"):
        load_peft(foreign)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (f"base_model.model.{Q_PROJ}.lora_magnitude_vector", (32,)),
        (f"base_model.model.{Q_PROJ}.lora_B.bias", (32,)),
        ("base_model.model.lm_head.weight", (64, 32)),
        ("../../etc/passwd", (2, 2)),
        (f"base_model.model.{'x' * 300}.lora_A.weight", (2, 2)),
    ],
)
def test_a_tensor_that_is_no_linear_factor_is_refused_by_name(tmp_path, name, shape):
    foreign = as_foreign(tmp_path / "theirs")
    edit_weights(foreign, lambda tensors: tensors.update({name: torch.zeros(shape)}))

    with pytest.raises(Unsupported) as refused:
        load_peft(foreign)
    assert name.startswith(refused.value.tensor)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value):
    foreign = as_foreign(tmp_path / "theirs")
    edit_weights(foreign, lambda tensors: tensors[A_KEY].fill_(value))

    with pytest.raises(NotFinite) as refused:
        load_peft(foreign)
    assert refused.value.tensor == A_KEY


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(A_KEY),
        lambda tensors: tensors.update({A_KEY: tensors[A_KEY][:2]}),
        lambda tensors: tensors.update({A_KEY: tensors[A_KEY].T}),
        lambda tensors: tensors.update({A_KEY: tensors[A_KEY].double()}),
        lambda tensors: tensors.update({A_KEY: tensors[A_KEY].half()}),
        lambda tensors: tensors.update({A_KEY: tensors[A_KEY].float() * 1e37}),
        lambda tensors: tensors.update({A_KEY: torch.zeros(4, 0)}),
        lambda tensors: tensors.update({A_KEY: torch.zeros(4, 4, 4)}),
        lambda tensors: tensors.clear(),
    ],
    ids=["half a pair", "wrong rank", "transposed", "float64", "two dtypes", "1e37", "no inputs", "3-D", "empty"],
)
def test_factors_that_make_no_sense_are_refused(tmp_path, change):
    foreign = as_foreign(tmp_path / "theirs", dtype=torch.float32)
    edit_weights(foreign, change)

    with pytest.raises(AdapterInvalid):
        load_peft(foreign)


def test_a_folder_of_ours_that_was_changed_is_refused(tmp_path):
    save_peft(random_adapter(), tmp_path / "out")
    edit_weights(tmp_path / "out", lambda tensors: tensors[A_KEY].mul_(2))

    with pytest.raises(AdapterInvalid, match=r"is not what flora\.json says"):
        load_peft(tmp_path / "out")


def test_a_changed_alpha_in_our_folder_is_refused(tmp_path):
    save_peft(random_adapter(), tmp_path / "out")
    edit_config(tmp_path / "out", lora_alpha=64)

    with pytest.raises(AdapterInvalid, match=r"is not what flora\.json says"):
        load_peft(tmp_path / "out")


def test_a_record_that_claims_another_base_is_refused(tmp_path):
    save_peft(random_adapter(), tmp_path / "out")
    text = (tmp_path / "out" / RECORD).read_text()
    (tmp_path / "out" / RECORD).write_text(text.replace(BASE.base_id, "sha256:" + "c" * 64))

    with pytest.raises(AdapterInvalid, match=r"is not what flora\.json says"):
        load_peft(tmp_path / "out")


def test_a_record_cannot_name_a_file_outside_its_folder(tmp_path):
    save_peft(random_adapter(extras={CHAT_TEMPLATE: b"x"}), tmp_path / "out")
    text = (tmp_path / "out" / RECORD).read_text()
    (tmp_path / "out" / RECORD).write_text(text.replace(CHAT_TEMPLATE, "../secret"))
    (tmp_path / "secret").write_bytes(b"x")

    with pytest.raises(AdapterInvalid):
        load_peft(tmp_path / "out")
