"""gc, fsck and reindex."""

import os
import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from flora.adapter import CHAT_TEMPLATE, BaseBinding, ChangeReport, make_adapter
from flora.errors import AdapterInvalid, StoreError
from flora.forms import Form
from flora.identity import BaseRecord, TensorRecord
from flora.lowrank import LowRank
from flora.names import Digest
from flora.registry import Registry
from flora.registry.packing import get_report
from tests.registry.adapters import BASE, HIDDEN, MLP, Q_PROJ, UP_PROJ, random_adapter

DOWN_PROJ = "model.layers.0.mlp.down_proj"
RECORD = BaseRecord((TensorRecord("w", "BF16", (2, 2), "0" * 64),))


def blob_files(registry: Registry) -> list[Path]:
    return sorted(path for path in (registry.root / "blobs").rglob("*") if path.is_file())


def make_old(path: Path, hours: float = 2) -> None:
    then = time.time() - hours * 3600
    os.utime(path, (then, then))


def kinds(registry: Registry) -> list[tuple[str, str]]:
    return [(problem.kind, problem.subject) for problem in registry.fsck()]


# gc


def test_gc_takes_what_no_version_and_no_base_refers_to(registry, tmp_path):
    registry.register_base(RECORD, name="org/base", path=tmp_path)
    kept = registry.add(random_adapter(0, extras={CHAT_TEMPLATE: b"shared"}), "sql")
    registry.add(random_adapter(1, extras={CHAT_TEMPLATE: b"shared"}), "chat")
    before = len(blob_files(registry))
    registry.remove("chat")

    report = registry.gc(grace_s=0)

    assert len(report.removed) == 3  # manifest, weights, report; the template is shared
    assert len(blob_files(registry)) == before - 3
    assert report.num_bytes > 0
    assert registry.load(kept).extras == {CHAT_TEMPLATE: b"shared"}
    assert registry.base_record(str(RECORD.base_id)) == RECORD
    assert registry.fsck() == []


def test_gc_leaves_the_young_to_the_writers_that_are_about_to_name_them(registry):
    registry.remove(registry.add(random_adapter(), "sql").ref)

    assert registry.gc().removed == ()
    assert registry.gc().kept_young == 3
    for path in blob_files(registry):
        make_old(path)
    assert len(registry.gc().removed) == 3


def test_a_dry_run_tells_and_takes_nothing(registry):
    registry.remove(registry.add(random_adapter(), "sql").ref)
    before = blob_files(registry)

    dry = registry.gc(dry_run=True, grace_s=0)

    assert blob_files(registry) == before
    wet = registry.gc(grace_s=0)
    assert (dry.removed, dry.num_bytes, dry.dry_run) == (wet.removed, wet.num_bytes, True)


def test_gc_takes_what_a_crash_left_under_tmp_once_it_is_old(registry):
    registry.add(random_adapter(), "sql")
    leftover = registry.root / "tmp" / "0123"
    leftover.write_bytes(b"half a blob")

    assert registry.gc().removed == ()
    make_old(leftover)
    report = registry.gc()
    assert (report.removed, report.num_bytes) == (("0123",), 11)
    assert not leftover.exists()


def test_gc_keeps_files_that_it_does_not_know(registry):
    registry.add(random_adapter(), "sql")
    stranger = registry.root / "blobs" / "sha256" / "aa" / "README"
    stranger.parent.mkdir(exist_ok=True)
    stranger.write_text("not a digest")

    assert registry.gc(grace_s=0).removed == ()
    assert stranger.exists()


def test_the_record_of_a_base_that_only_adapters_name_is_kept(registry, tmp_path):
    registry.register_base(RECORD, name="org/base", path=tmp_path)
    base = type(BASE)(name="org/base", base_id=str(RECORD.base_id))
    registry.add(random_adapter(base=base), "sql")
    with sqlite3.connect(registry.root / "index.sqlite") as index:
        index.execute("DELETE FROM bases")

    registry.gc(grace_s=0)

    assert registry.base_record(str(RECORD.base_id)) == RECORD


# fsck


def test_a_sound_registry_has_no_problems(registry, tmp_path):
    registry.register_base(RECORD, name="org/base", path=tmp_path)
    for seed in range(3):
        registry.add(random_adapter(seed, extras={CHAT_TEMPLATE: b"x"}), f"name-{seed % 2}")
    registry.set_alias("name-0", "prod", registry.resolve("name-0@v1"))

    assert registry.fsck() == []


def test_every_blob_that_is_missing_or_changed_is_reported_for_its_version(registry):
    registry.add(random_adapter(extras={CHAT_TEMPLATE: b"x"}), "sql")

    for path in blob_files(registry):
        data = path.read_bytes()
        path.unlink()
        assert ("missing", "sql@v1") in kinds(registry)
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert ("damaged", "sql@v1") in kinds(registry)
        path.write_bytes(data[:-1])
        assert ("damaged", "sql@v1") in kinds(registry)
        path.write_bytes(data)
        assert registry.fsck() == []


def test_bit_rot_is_found_wherever_it_strikes(registry):
    version = registry.add(random_adapter(), "sql")
    generator = torch.Generator().manual_seed(1)
    for path in blob_files(registry):
        data = path.read_bytes()
        path.chmod(0o644)
        for position in torch.randint(len(data), (8,), generator=generator).tolist():
            path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
            assert ("damaged", version.ref) in kinds(registry), f"{path.name} at {position}"
        path.write_bytes(data)
    assert registry.fsck() == []


def test_a_missing_base_record_is_reported(registry, tmp_path):
    registry.register_base(RECORD, name="org/base", path=tmp_path)
    registry._home.store.delete(Digest(str(RECORD.base_id)))

    assert kinds(registry) == [("missing", "base org/base")]


def test_weights_that_are_not_finite_are_reported(registry):
    factors = {Q_PROJ: LowRank(A=torch.full((2, 32), float("nan")), B=torch.ones(32, 2))}
    registry.add(make_adapter(factors, BASE, random_adapter().header.recipe), "sql")

    assert kinds(registry) == [("not_finite", "sql@v1")]


def test_weights_of_other_shapes_than_the_header_says_are_reported(registry):
    adapter = random_adapter()
    lying = dict(adapter.factors) | {Q_PROJ: random_adapter(1, {Q_PROJ: 5}).factors[Q_PROJ]}
    registry.add(type(adapter)(header=adapter.header, factors=lying, report=adapter.report), "sql")

    assert kinds(registry) == [("shape", "sql@v1")]


def test_an_adapter_that_does_not_fit_the_record_of_its_base_is_reported(registry, tmp_path):
    """One module of another shape, one that the base lacks, one tensor whose bytes are not those it was made from."""
    shapes = {Q_PROJ: (HIDDEN, HIDDEN), UP_PROJ: (MLP + 1, HIDDEN)}
    record = BaseRecord(
        tuple(TensorRecord(f"{name}.weight", "BF16", shape, "0" * 64) for name, shape in sorted(shapes.items()))
    )
    registry.register_base(record, name="org/base", path=tmp_path)
    ours = BaseBinding(name="org/base", base_id=str(record.base_id))
    registry.add(random_adapter(ranks={Q_PROJ: 2}, base=ours), "fits")
    registry.add(random_adapter(ranks={UP_PROJ: 2, DOWN_PROJ: 2}, base=ours), "strange")
    moved = msgspec.structs.replace(ours, touched={f"{Q_PROJ}.weight": "1" * 64})
    registry.add(random_adapter(1, ranks={Q_PROJ: 2}, base=moved), "moved")

    found = [(problem.kind, problem.subject, problem.what) for problem in registry.fsck()]

    assert found == [
        ("base", "moved@v1", f"{Q_PROJ}.weight of its base has another sha256 than it was made from"),
        ("base", "strange@v1", f"{DOWN_PROJ} is [32, 48] in the adapter, and its base has none"),
        ("base", "strange@v1", f"{UP_PROJ} is [48, 32] in the adapter, and its base has it as [49, 32]"),
    ]


def test_every_kind_of_part_is_held_against_the_base_in_its_own_way(registry, tmp_path):
    """A Conv1D lies transposed, a convolution has a kernel, of a table that has grown only the new rows are carried."""
    tensors = {"c_fc": (8, 12), "conv": (6, 4, 3, 3), "embed": (10, 4), "norm": (4,)}
    record = BaseRecord(
        tuple(TensorRecord(f"{name}.weight", "F32", shape, "0" * 64) for name, shape in sorted(tensors.items()))
    )
    registry.register_base(record, name="org/base", path=tmp_path)
    sizes = {"c_fc": (12, 8), "conv": (6, 36), "embed": (10, 4)}  # [out, in]
    adapter = make_adapter(
        {name: LowRank(A=torch.ones(1, size[1]), B=torch.ones(size[0], 1)) for name, size in sizes.items()},
        BaseBinding(name="org/base", base_id=str(record.base_id)),
        random_adapter().header.recipe,
        forms={"c_fc": Form(kind="conv1d"), "conv": Form(kind="conv", kernel=(3, 3)), "embed": Form(kind="embedding")},
        exact={"norm.weight": torch.ones(4), "embed.weight": torch.ones(3, 4)},
        first_rows={"embed.weight": 10},
    )
    registry.add(adapter, "kinds")

    assert registry.fsck() == []


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("UPDATE versions SET max_rank = 99", "index"),
        ("UPDATE versions SET serving_digest = 'sha256:0'", "index"),
        ("DELETE FROM version_blobs", "index"),
        ("UPDATE aliases SET version_id = 77", "alias"),
        ("UPDATE aliases SET name_id = 77", "alias"),
    ],
)
def test_an_index_that_was_tampered_with_is_reported(registry, statement, kind):
    registry.add(random_adapter(), "sql")
    with sqlite3.connect(registry.root / "index.sqlite") as index:
        index.execute(statement)

    assert kind in {problem.kind for problem in registry.fsck()}
    registry.reindex()
    assert registry.fsck() == []


def test_a_version_that_the_journal_does_not_know_is_reported(registry):
    registry.add(random_adapter(), "sql")
    (registry.root / "journal.jsonl").unlink()

    assert kinds(registry) == [("journal", "sql@v1")]


def test_orphans_and_leftovers_are_reported_as_harmless(registry):
    registry.remove(registry.add(random_adapter(), "sql").ref)
    (registry.root / "tmp" / "0123").write_bytes(b"x")

    problems = registry.fsck()

    assert {problem.kind for problem in problems} == {"orphan", "leftover"}
    assert all(problem.is_harmless for problem in problems)


def test_fsck_changes_nothing(registry):
    registry.remove(registry.add(random_adapter(), "sql").ref)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in registry.root.rglob("*")}

    registry.fsck()

    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in registry.root.rglob("*")} == before


# reindex


def everything(registry: Registry) -> object:
    names = [entry.name for entry in registry.names()]
    return (
        registry.names(),
        {name: registry.versions(name) for name in names},
        {name: registry.aliases(name) for name in names},
        {name: registry.history(name, alias) for name in names for alias in ("latest", "prod")},
        {version.ref: registry.provenance(version) for name in names for version in registry.versions(name)},
    )


@pytest.fixture
def lived_in(registry):
    """A registry with a history: versions removed, aliases moved back and forth."""
    for seed in range(4):
        registry.add(random_adapter(seed), "sql", provenance={"seed": seed})
    registry.add(random_adapter(9), "ann/chat")
    registry.set_alias("sql", "prod", registry.resolve("sql@v2"), reason="release")
    registry.set_alias("sql", "prod", registry.resolve("sql@v1"), reason="rollback")
    registry.remove("sql@v2")
    registry.remove("sql@v4")
    registry.remove(registry.add(random_adapter(5), "gone").name)
    return registry


def test_a_rebuilt_index_is_the_index(lived_in):
    before = everything(lived_in)

    report = lived_in.reindex()

    assert (report.num_versions, report.skipped) == (3, ())
    assert everything(lived_in) == before
    assert lived_in.add(random_adapter(7), "sql").number == 5
    assert lived_in.add(random_adapter(7), "gone").number == 2


def test_an_index_that_is_lost_is_rebuilt_when_the_registry_is_opened(lived_in, tmp_path):
    before = everything(lived_in)
    lived_in.close()
    (lived_in.root / "index.sqlite").unlink()

    with Registry.open(lived_in.root) as opened:
        assert everything(opened) == before
        opened.add(random_adapter(7), "sql")
        assert opened.fsck() == [problem for problem in opened.fsck() if problem.is_harmless]
        after = everything(opened)
        opened.reindex()
        assert everything(opened) == after


def test_bases_keep_their_place_when_the_index_is_rebuilt(registry, tmp_path):
    registry.register_base(RECORD, name="org/base", path=tmp_path)
    before = registry.bases()

    registry.reindex()

    assert registry.bases() == before


def test_a_rebuild_passes_over_what_is_damaged_and_says_so(lived_in):
    damaged = lived_in.resolve("sql@v3")
    lived_in._home.store.delete(Digest(damaged.digest))

    report = lived_in.reindex()

    assert (report.num_versions, report.skipped) == (2, ("sql@v3",))
    assert lived_in.resolve("sql:prod").number == 1
    assert "latest" not in lived_in.aliases("sql")


def test_a_torn_line_of_the_journal_costs_nothing(lived_in):
    with (lived_in.root / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"id":99,"change":{"op":"ad')
    lived_in.add(random_adapter(8), "sql")
    before = everything(lived_in)

    lived_in.reindex()

    assert everything(lived_in) == before


# Records that cannot be true: in a registry that another program wrote, under digests that are right


@pytest.fixture
def unsound(registry, monkeypatch):
    """A registry with sql@v1, whose header names no dtype, and chat@v1, whose report keeps more than there was."""
    sound = random_adapter()
    assert sound.report is not None
    first = msgspec.structs.replace(sound.header.modules[0], dtype="int3")
    header = msgspec.structs.replace(sound.header, modules=(first, *sound.header.modules[1:]))
    tensor = msgspec.structs.replace(sound.report.tensors[0], norm_squared=1.0, kept=99.0)
    with monkeypatch.context() as patched:
        patched.setattr("flora.registry.packing.check_header", lambda *_: None)
        patched.setattr("flora.registry.packing.check_report", lambda *_: None)
        patched.setattr("flora.registry.cutting._ITEM_BYTES", {"bfloat16": 2, "int3": 1})
        registry.add(replace(sound, header=header), "sql")
        registry.add(replace(sound, report=ChangeReport(tensors=(tensor,))), "chat")
    return registry


def test_a_record_that_cannot_be_true_is_refused_by_its_field_wherever_it_is_read(unsound):
    for read in (unsound.header, unsound.load, unsound.report):
        with pytest.raises(StoreError, match=r"header\.modules\[0\]\.dtype = 'int3'") as refused:
            read(unsound.resolve("sql"))
        assert refused.value.field == "header.modules[0].dtype"
    for read in (unsound.load, unsound.report):
        with pytest.raises(StoreError, match=r"report\.tensors\[0\]\.kept = 99\.0"):
            read(unsound.resolve("chat"))


def test_fsck_names_records_that_cannot_be_true(unsound):
    found = {problem.subject: problem for problem in unsound.fsck()}

    assert {subject: problem.kind for subject, problem in found.items()} == {"sql@v1": "damaged", "chat@v1": "damaged"}
    assert "header.modules[0].dtype" in found["sql@v1"].what
    assert "report.tensors[0].kept" in found["chat@v1"].what


def test_a_rebuild_passes_over_records_that_cannot_be_true(unsound):
    unsound.add(random_adapter(1), "sound")

    assert unsound.reindex().skipped == ("sql@v1", "chat@v1")
    assert [entry.name for entry in unsound.names()] == ["sound"]


def test_a_report_that_is_none_is_a_damaged_blob(registry):
    version = registry.add(random_adapter(), "sql")
    manifest = registry._home.manifest(version)
    other = msgspec.structs.replace(manifest, report=registry._home.store.put([b"[]"]))

    with pytest.raises(StoreError, match="cannot be read"):
        get_report(registry._home.store, other)


def test_what_could_not_be_read_again_is_not_stored(registry):
    sound = random_adapter()
    first = msgspec.structs.replace(sound.header.modules[0], rank=0)
    header = msgspec.structs.replace(sound.header, modules=(first, *sound.header.modules[1:]))

    with pytest.raises(AdapterInvalid, match=r"header\.modules\[0\]\.rank = 0"):
        registry.add(replace(sound, header=header), "sql")

    assert registry.names() == []
    assert blob_files(registry) == []


def test_weights_of_another_dtype_than_the_header_says_are_reported(registry):
    sound = random_adapter()
    first = msgspec.structs.replace(sound.header.modules[0], dtype="float16")
    header = msgspec.structs.replace(sound.header, modules=(first, *sound.header.modules[1:]))
    version = registry.add(replace(sound, header=header), "sql")

    assert kinds(registry) == [("shape", version.ref)]
    with pytest.raises(AdapterInvalid, match="bfloat16") as refused:
        registry.load(version)
    assert refused.value.field == "dtype"
