"""The two identities of an adapter, and its records."""

import dataclasses

import msgspec
import pytest
import torch

from flora.adapter import (
    CHAT_TEMPLATE,
    Adapter,
    AdapterHeader,
    BaseBinding,
    ChangeReport,
    Recipe,
    TensorChange,
    make_adapter,
    report_of_factors,
    tensor_sha256,
    to_json,
)
from flora.canonical import canonical_json
from flora.digests import digest_bytes, digest_file, digest_json
from flora.lowrank import LowRank

BASE = BaseBinding(name="org/tiny", base_id="sha256:" + "b" * 64)
FACTORS = {
    "z": LowRank(A=torch.ones(2, 3), B=torch.full((4, 2), 0.5), scale=2.0),
    "a": LowRank(A=torch.ones(1, 3), B=torch.ones(5, 1)),
    "empty": LowRank(A=torch.ones(0, 3), B=torch.ones(5, 0)),
}


def adapter(**changes: object) -> Adapter:
    given = {"factors": FACTORS, "base": BASE, "recipe": Recipe(operation="extract"), "extras": {CHAT_TEMPLATE: b"x"}}
    return make_adapter(**(given | changes))


def serving(**changes: object) -> str:
    return str(adapter(**changes).header.serving_digest)


def test_a_header_describes_the_modules_in_the_order_of_names_without_empty_ones():
    header = adapter().header

    assert [(m.name, m.rank, m.in_features, m.out_features, m.scale) for m in header.modules] == [
        ("a", 1, 3, 5, 1.0),
        ("z", 2, 3, 4, 2.0),
    ]
    assert header.max_rank == 2
    assert header.num_parameters == 1 * (3 + 5) + 2 * (3 + 4)
    assert [module.name for module, _ in adapter()] == ["a", "z"]


def test_what_changes_an_answer_changes_the_serving_digest():
    halved = FACTORS | {"a": LowRank(A=torch.ones(1, 3), B=torch.ones(5, 1) / 2)}
    rescaled = FACTORS | {"a": dataclasses.replace(FACTORS["a"], scale=0.5)}
    in_half = FACTORS | {"a": LowRank(A=torch.ones(1, 3).half(), B=torch.ones(5, 1).half())}
    digests = {
        serving(),
        serving(factors=halved),
        serving(factors=rescaled),
        serving(factors=in_half),
        serving(factors={"a": FACTORS["a"]}),
        serving(base=BaseBinding(name="org/tiny", base_id="sha256:" + "c" * 64)),
        serving(base=BaseBinding(name="org/tiny", base_id=None)),
        serving(extras={CHAT_TEMPLATE: b"y"}),
        serving(extras={}),
        serving(bench_salt="1"),
    }

    assert len(digests) == 10


def test_what_changes_no_answer_leaves_the_serving_digest():
    assert serving() == serving(recipe=Recipe(operation="prune", parents=("sha256:" + "0" * 64,), tuned_name="t"))
    assert serving() == serving(base=BaseBinding(name="another/name", base_id=BASE.base_id, touched={"w": "0" * 64}))
    assert serving() == serving(report=report_of_factors({"a": FACTORS["a"]}))


def test_a_claimed_base_counts_by_its_name():
    claimed = [BaseBinding(name=name, base_id=None) for name in ("org/one", "org/two")]

    assert serving(base=claimed[0]) != serving(base=claimed[1])


def test_records_survive_json():
    header, report = adapter().header, report_of_factors({"a": FACTORS["a"]})

    assert msgspec.json.decode(canonical_json(to_json(header)), type=AdapterHeader) == header
    assert msgspec.json.decode(canonical_json(to_json(report)), type=ChangeReport) == report


def test_a_tensors_hash_is_of_its_bytes_in_row_major_order():
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)

    assert tensor_sha256(tensor) == digest_bytes(tensor.numpy().tobytes()).hex
    assert tensor_sha256(tensor.T) == digest_bytes(tensor.numpy().T.tobytes()).hex
    assert tensor_sha256(tensor.bfloat16()) != tensor_sha256(tensor)


def test_a_report_tells_the_share_of_the_whole_change():
    changes = [
        ("extracted", 60.0, 45.0),
        ("not_extractable", 30.0, 0.0),
        ("excluded", 10.0, 0.0),
        ("unchanged", 0.0, 0.0),
    ]
    report = ChangeReport(
        tensors=tuple(
            TensorChange(name=str(i), shape=(1,), status=status, norm_squared=norm, kept=kept)
            for i, (status, norm, kept) in enumerate(changes)
        )
    )

    assert report.norm_squared == 100.0
    assert report.kept_share == 0.45
    assert report.extracted_share == 0.75
    assert report.share(report.by_name()["1"]) == 0.3


def test_a_report_of_no_change_kept_all_of_it():
    assert ChangeReport(tensors=()).kept_share == 1.0
    assert ChangeReport(tensors=()).extracted_share == 1.0


def test_an_import_is_its_own_reference():
    report = report_of_factors({"z": FACTORS["z"]})

    (change,) = report.tensors
    assert change.name == "z.weight"
    assert change.shape == (4, 3)
    assert change.norm_squared == change.kept == pytest.approx(float(FACTORS["z"].delta().square().sum()))
    assert report.kept_share == 1.0


def test_canonical_json_has_one_spelling():
    assert canonical_json({"b": 1.0, "a": (1, "é")}) == '{"a":[1,"é"],"b":1}'.encode()
    assert digest_json({"b": 1, "a": 2}) == digest_json({"a": 2, "b": 1})


def test_a_files_digest_is_that_of_its_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * (5 << 20))

    assert digest_file(tmp_path / "file") == digest_bytes(b"x" * (5 << 20))
