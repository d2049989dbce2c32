"""The registry's door: versions, loading, removal, opening."""

import dataclasses
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
import torch

from flora.adapter import CHAT_TEMPLATE, GENERATION_CONFIG, BaseBinding, Recipe, make_adapter
from flora.errors import AdapterInvalid, AdapterNotFound, NameInvalid, NotFound, StoreError, UsageError
from flora.identity import BaseRecord, TensorRecord
from flora.names import parse_reference
from flora.registry import Registry
from tests.registry.adapters import BASE, Q_PROJ, random_adapter


def test_what_was_added_is_loaded_bit_for_bit(registry):
    adapter = random_adapter(extras={CHAT_TEMPLATE: b"{{ messages }}"})

    version = registry.add(adapter, "sql")
    loaded = registry.load(version)

    assert loaded.header == adapter.header
    assert loaded.report == adapter.report
    assert loaded.extras == adapter.extras
    for name, factors in adapter.factors.items():
        assert torch.equal(loaded.factors[name].A, factors.A)
        assert torch.equal(loaded.factors[name].B, factors.B)
        assert loaded.factors[name].scale == factors.scale


def test_a_version_says_what_it_is_without_its_weights(registry):
    before = datetime.now(UTC)
    version = registry.add(random_adapter(), "ann/sql")

    assert version.ref == "ann/sql@v1"
    assert version.serving_digest == str(random_adapter().header.serving_digest)
    assert (version.base_id, version.base_name) == (BASE.base_id, BASE.name)
    assert (version.max_rank, version.num_modules, version.operation) == (4, 2, "extract")
    assert version.kept_share == 1.0
    assert version.num_bytes > sum(factors.num_bytes for factors in random_adapter().factors.values())
    assert before <= version.created_at <= datetime.now(UTC)
    assert registry.header(version) == random_adapter().header
    assert registry.report(version) == random_adapter().report


def test_extras_are_read_by_name(registry):
    version = registry.add(random_adapter(extras={CHAT_TEMPLATE: b"x"}), "sql")

    assert registry.extra(version, CHAT_TEMPLATE) == b"x"
    assert registry.extra(version, GENERATION_CONFIG) is None


def test_the_version_digest_sees_no_clock_host_path_or_registry(tmp_path):
    digests = set()
    for folder in ("here", "there"):
        with Registry.open(tmp_path / folder) as registry:
            digests.add(registry.add(random_adapter(), folder, provenance={"wall_s": folder}).digest)

    assert len(digests) == 1


def test_the_version_digest_covers_report_and_lineage(registry):
    adapter = random_adapter()
    header = adapter.header
    other_recipe = Recipe(operation="extract", tuned_name="another")

    versions = [
        registry.add(adapter, "sql"),
        registry.add(make_adapter(adapter.factors, BASE, header.recipe, report=None), "sql"),
        registry.add(make_adapter(adapter.factors, BASE, other_recipe, adapter.report), "sql"),
    ]

    assert len({version.digest for version in versions}) == 3
    assert len({version.serving_digest for version in versions}) == 1


def test_provenance_is_kept_beside_the_identity(registry):
    version = registry.add(random_adapter(), "sql", provenance={"wall_s": 1.5})

    provenance = registry.provenance(version)
    assert provenance["wall_s"] == 1.5
    assert {"flora", "host"} <= set(provenance)


# Versions and names


def test_versions_are_numbered_per_name_from_one(registry):
    first = [registry.add(random_adapter(seed), "sql").number for seed in range(3)]
    other = registry.add(random_adapter(0), "chat").number

    assert first == [1, 2, 3]
    assert other == 1
    assert [version.number for version in registry.versions("sql")] == [1, 2, 3]


def test_adding_the_same_adapter_again_gives_the_same_version(registry):
    first = registry.add(random_adapter(), "sql")
    registry.add(random_adapter(1), "sql")

    again = registry.add(random_adapter(), "sql")

    assert again == first
    assert len(registry.versions("sql")) == 2
    assert registry.resolve("sql:latest") == first


def test_a_number_is_never_given_twice(registry):
    registry.add(random_adapter(0), "sql")
    registry.add(random_adapter(1), "sql")
    registry.remove("sql@v2")
    assert registry.add(random_adapter(2), "sql").number == 3

    registry.remove("sql")
    assert registry.add(random_adapter(3), "sql").number == 4


def test_many_are_added_in_bulk_as_they_are_one_by_one(registry, tmp_path):
    items = [(random_adapter(seed), f"adapter-{seed % 3}") for seed in (*range(9), 4)]  # the last is there already

    def moves(of: Registry) -> list[tuple[str, str | None, str | None, str]]:
        history = [move for number in range(3) for move in of.history(f"adapter-{number}", "latest")]
        return [(move.name, move.digest, move.previous, move.reason) for move in history]

    with Registry.open(tmp_path / "other") as other:
        one_by_one = [other.add(adapter, name) for adapter, name in items]
        moved_one_by_one = moves(other)

    in_bulk = registry.add_many(iter(items))

    assert [(v.ref, v.digest) for v in in_bulk] == [(v.ref, v.digest) for v in one_by_one]
    assert registry.resolve("adapter-2") == in_bulk[8]
    assert registry.resolve("adapter-1") == in_bulk[4]
    assert moves(registry) == moved_one_by_one
    registry.reindex()
    assert registry.fsck() == []
    assert registry.resolve("adapter-1") == in_bulk[4]


def test_what_is_refused_in_bulk_leaves_no_row_of_its_batch(registry):
    registry.set_alias("sql", "prod", registry.add(random_adapter(0), "sql"))
    registry.protect("sql", "prod")
    other_base = BaseBinding(name="org/other", base_id="sha256:" + "c" * 64)

    with pytest.raises(UsageError, match=r"sql:prod is protected, and stays at sql@v1"):
        registry.add_many([(random_adapter(1), "chat"), (random_adapter(2), "sql")], alias="prod")
    with pytest.raises(UsageError, match="the name chat belongs to another base"):
        registry.add_many([(random_adapter(1), "chat"), (random_adapter(2, base=other_base), "chat")])

    assert [entry.name for entry in registry.names()] == ["sql"]
    assert registry.fsck() == [problem for problem in registry.fsck() if problem.is_harmless]


@pytest.mark.parametrize("name", ["../x", "a/b/c", "sql:prod", "sql@v1", "", "a b"])
def test_an_adapter_needs_a_proper_name(registry, name):
    with pytest.raises(NameInvalid):
        registry.add(random_adapter(), name)
    assert registry.names() == []


@pytest.mark.parametrize("alias", ["v1", "../x", ""])
def test_an_alias_needs_a_proper_name(registry, alias):
    with pytest.raises(NameInvalid):
        registry.add(random_adapter(), "sql", alias=alias)
    assert registry.names() == []


def test_a_name_belongs_to_one_base(registry):
    other = BaseBinding(name="org/other", base_id="sha256:" + "c" * 64)
    registry.add(random_adapter(), "sql")

    with pytest.raises(UsageError, match="belongs to another base: org/tiny"):
        registry.add(random_adapter(base=other), "sql")
    assert len(registry.versions("sql")) == 1

    registry.remove("sql")
    assert registry.add(random_adapter(base=other), "sql").base_name == "org/other"


def test_a_claimed_base_goes_with_a_proven_one_of_the_same_name_only(registry):
    registry.add(random_adapter(), "sql")

    registry.add(random_adapter(1, base=BaseBinding(name=BASE.name, base_id=None)), "sql")
    with pytest.raises(UsageError, match="another base"):
        registry.add(random_adapter(2, base=BaseBinding(name="org/other", base_id=None)), "sql")


# Removal


def test_a_removed_version_is_gone_and_latest_falls_back(registry, three):
    assert registry.remove("sql@v3") == [three[2]]

    assert registry.resolve("sql") == three[1]
    assert [version.number for version in registry.versions("sql")] == [1, 2]
    with pytest.raises(AdapterNotFound):
        registry.resolve("sql@v3")
    assert registry.history("sql", "latest")[-1].reason == "removal of its version"


def test_a_name_is_removed_with_all_its_versions(registry, three):
    assert registry.remove("sql") == three

    assert [entry.name for entry in registry.names()] == ["chat"]
    with pytest.raises(AdapterNotFound):
        registry.resolve("sql")


def test_an_alias_protects_its_version(registry, three):
    registry.set_alias("sql", "prod", three[0])

    for ref in ("sql@v1", "sql", f"sql@{three[0].digest}"):
        with pytest.raises(UsageError, match="has the alias prod"):
            registry.remove(ref)
    assert registry.remove("sql@v2") == [three[1]]
    assert registry.remove("sql@v1", force=True) == [three[0]]
    assert registry.aliases("sql") == {"latest": three[2]}
    assert registry.history("sql", "prod")[-1].digest is None


def test_removal_names_versions_and_not_aliases(registry, three):
    with pytest.raises(UsageError, match="removal is of versions"):
        registry.remove("sql:latest")
    with pytest.raises(AdapterNotFound):
        registry.remove("nobody")
    with pytest.raises(AdapterNotFound):
        registry.remove("sql@v9")


# Bases


RECORD = BaseRecord((TensorRecord("w", "BF16", (2, 2), "0" * 64),))


def test_a_base_is_known_by_its_record_and_its_place_here(registry, tmp_path):
    registry.register_base(RECORD, name="org/base", path=tmp_path / "elsewhere")
    registry.register_base(RECORD, name="org/base", path=tmp_path)
    registry.add(random_adapter(base=BaseBinding(name="org/base", base_id=str(RECORD.base_id))), "sql")
    registry.add(random_adapter(), "chat")

    known = {base.base_id: base for base in registry.bases()}
    base = known[str(RECORD.base_id)]
    assert (base.name, base.path, base.num_adapters) == ("org/base", tmp_path.resolve(), 1)
    assert (known[BASE.base_id].path, known[BASE.base_id].num_adapters) == (None, 1)
    assert registry.base_record(str(RECORD.base_id)) == RECORD
    assert registry.base_record(BASE.base_id) is None


def test_no_manifest_says_where_a_base_lies(registry, tmp_path):
    registry.register_base(RECORD, name="org/base", path=tmp_path)
    registry.add(random_adapter(base=BaseBinding(name="org/base", base_id=str(RECORD.base_id))), "sql")

    for file in (registry.root / "blobs").rglob("*"):
        assert not file.is_file() or str(tmp_path).encode() not in file.read_bytes()


# Opening


def test_a_registry_is_opened_by_folder_or_by_url(tmp_path):
    with Registry.open(tmp_path / "home" / "registry") as registry:
        version = registry.add(random_adapter(), "sql")
    for url in (str(tmp_path / "home/registry"), f"sqlite:///{tmp_path}/home/registry/index.sqlite"):
        with Registry.open(url) as registry:
            assert registry.resolve("sql") == version


def test_a_registry_that_is_not_there_is_made_only_if_asked(tmp_path):
    with pytest.raises(NotFound, match="no registry"):
        Registry.open(tmp_path / "nowhere", create=False)
    assert not (tmp_path / "nowhere").exists()


def test_another_kind_of_url_is_refused(tmp_path):
    with pytest.raises(UsageError, match="mysql"):
        Registry.open("mysql://host/db")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        Registry.open(tmp_path / "file" / "registry")


def test_an_index_that_is_no_database_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "index.sqlite").write_bytes(b"not a database, but long enough to look at" * 50)

    with pytest.raises(StoreError) as refused:
        Registry.open(tmp_path)
    assert "rebuilds it" in refused.value.fix


def test_a_damaged_blob_is_noticed_on_loading_and_healed_by_adding_again(registry):
    version = registry.add(random_adapter(), "sql")
    weights = max((registry.root / "blobs").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(data)

    with pytest.raises(StoreError, match="is damaged"):
        registry.load(version)
    registry.add(random_adapter(), "sql")
    assert torch.equal(registry.load(version).factors[Q_PROJ].A, random_adapter().factors[Q_PROJ].A)


def test_a_manifest_of_a_newer_flora_says_so(registry):
    version = registry.add(random_adapter(), "sql")
    manifest = msgspec.json.decode(registry._home.store.read(parse_reference(f"sql@{version.digest}").digest))
    newer = registry._home.store.put([msgspec.json.encode(manifest | {"schema_version": 2})])

    with pytest.raises(StoreError, match="schema 2") as refused:
        registry.header(dataclasses.replace(version, digest=newer.digest))
    assert "upgrade" in refused.value.fix


def test_importing_the_registry_imports_neither_torch_nor_alembic():
    code = (
        "import sys, flora.registry; print({'torch', 'alembic', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path.cwd())

    assert printed.stdout.strip() == "set()", printed.stderr


def test_listing_and_resolving_import_no_torch(registry):
    registry.add(random_adapter(extras={CHAT_TEMPLATE: b"x"}), "sql")
    code = f"""
import sys
from flora.registry import Registry
registry = Registry.open({str(registry.root)!r})
version = registry.names()[0].version
registry.resolve("sql"), registry.header(version), registry.report(version)
assert registry.extra(version, "chat_template.jinja") == b"x"
print({{'torch', 'alembic'}} & set(sys.modules))
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path.cwd())

    assert printed.stdout.strip() == "set()", printed.stderr


def test_an_adapter_that_could_not_be_read_again_is_not_stored(registry):
    adapter = random_adapter()
    broken = msgspec.structs.replace(adapter.header.modules[0], alpha=0.0)
    header = msgspec.structs.replace(adapter.header, modules=(broken, *adapter.header.modules[1:]))

    with pytest.raises(AdapterInvalid, match="alpha"):
        registry.add(dataclasses.replace(adapter, header=header), "sql")

    assert registry.names() == []
    assert not any(path.is_file() for path in (registry.root / "blobs").rglob("*"))
