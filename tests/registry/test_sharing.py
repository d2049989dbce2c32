"""Equal large tensors of different adapters lie on the disk once, and nobody can tell but by the disk."""

import hashlib
import os
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from alembic import command
from alembic.config import Config
from torch import Tensor

import flora.registry.database as database
from flora.adapter import Adapter, make_adapter
from flora.forms import Form
from flora.lowrank import LowRank
from flora.names import Digest
from flora.registry import Registry, Version, cutting
from flora.registry.adding import _add_rows as add_rows
from flora.registry.cutting import MIN_SHARED_BYTES, large_tensors
from flora.registry.formats.tensors import as_bytes, encode, to_tensors
from flora.registry.home import Home
from flora.registry.sharing import _put_parts as put_parts
from tests.registry.adapters import BASE, Q_PROJ, random_adapter

TABLE = torch.randn(1024, 512, generator=torch.Generator().manual_seed(1)).bfloat16()  # 1 MiB, as few as are shared
HEAD = TABLE.flip(0)
WHOLE = 1 << 20


def with_tensors(seed: int, **exact: Tensor) -> Adapter:
    """An adapter with small factors of its own, and these tensors whole."""
    small = random_adapter(seed)
    return make_adapter(small.factors, BASE, small.header.recipe, small.report, exact=exact)


def disk_bytes(registry: Registry) -> int:
    return sum(path.stat().st_size for path in (registry.root / "blobs").rglob("*") if path.is_file())


def lists(registry: Registry) -> list[Path]:
    return sorted((registry.root / "blobs").rglob("*.parts"))


def blob_path(registry: Registry, digest: str) -> Path:
    hexdigits = Digest(digest).hex
    return registry.root / "blobs" / "sha256" / hexdigits[:2] / hexdigits


def weights_of(registry: Registry, version: Version) -> str:
    return registry._home.manifest(version).weights.digest


def digest_of(tensor: Tensor) -> str:
    return "sha256:" + hashlib.sha256(as_bytes(tensor)).hexdigest()


def same(left: Adapter, right: Adapter) -> bool:
    """Whether all numbers of the two are the same bits."""
    ours, theirs = to_tensors(left), to_tensors(right)
    return ours.keys() == theirs.keys() and all(as_bytes(ours[name]) == as_bytes(theirs[name]) for name in ours)


@pytest.fixture
def pair(registry) -> tuple[Version, Version]:
    """Two adapters that have one table in common."""
    first = registry.add(with_tensors(1, table=TABLE), "first")
    return first, registry.add(with_tensors(2, table=TABLE), "second")


# What is stored once


def test_a_tensor_that_two_adapters_have_is_stored_once_and_both_come_back_as_they_were(registry, pair):
    assert blob_path(registry, digest_of(TABLE)).stat().st_size == WHOLE
    assert WHOLE < disk_bytes(registry) < 1.1 * WHOLE
    for seed, version in enumerate(pair, start=1):
        assert same(registry.load(version), with_tensors(seed, table=TABLE))
        with registry.loading(version) as adapter:
            assert same(adapter, with_tensors(seed, table=TABLE))
    assert registry.fsck() == []


def test_no_digest_and_no_size_of_a_version_depends_on_what_is_shared(registry, pair, tmp_path):
    with Registry.open(tmp_path / "alone") as alone:
        version = alone.add(with_tensors(2, table=TABLE), "second")

    assert (version.digest, version.serving_digest, version.num_bytes) == (
        pair[1].digest, pair[1].serving_digest, pair[1].num_bytes
    )  # fmt: skip
    content = b"".join(encode(to_tensors(with_tensors(2, table=TABLE))))
    assert registry._home.store.read(Digest(weights_of(registry, version))) == content
    assert registry._home.store.size(Digest(weights_of(registry, version))) == version.num_bytes == len(content)


def test_a_file_that_has_nothing_in_common_is_kept_whole(registry):
    small = TABLE[:1023].clone()  # one row short of what is shared
    for seed, tensors in enumerate(
        [{"table": TABLE}, {"head": HEAD}, {"small": small}, {"small": small, "other": -HEAD}]
    ):
        version = registry.add(with_tensors(seed, **tensors), f"name-{seed}")
        content = b"".join(encode(to_tensors(with_tensors(seed, **tensors))))
        assert blob_path(registry, weights_of(registry, version)).read_bytes() == content
        assert registry.shared_bytes(version) == 0

    assert lists(registry) == []


def test_one_more_adapter_adds_what_it_alone_has_and_another_tensor_in_common_is_cut_out_later(registry, pair):
    before = disk_bytes(registry)
    third = registry.add(with_tensors(3, table=TABLE, head=HEAD), "third")
    assert WHOLE < disk_bytes(registry) - before < 1.1 * WHOLE  # the head

    fourth = registry.add(with_tensors(4, head=HEAD), "fourth")

    assert disk_bytes(registry) - before < 1.2 * WHOLE + third.num_bytes  # until gc, what was left of the third
    registry.gc(grace_s=0)
    assert disk_bytes(registry) < 2.2 * WHOLE
    assert same(registry.load(third), with_tensors(3, table=TABLE, head=HEAD))
    assert same(registry.load(fourth), with_tensors(4, head=HEAD))
    assert registry.shared_bytes(third) == 2 * WHOLE
    assert registry.shared_bytes(fourth) == registry.shared_bytes(pair[0]) == WHOLE
    assert registry.fsck() == []


def test_siblings_that_come_in_one_batch_share_as_well(registry):
    versions = registry.add_many((with_tensors(seed, table=TABLE), f"name-{seed}") for seed in range(5))

    assert disk_bytes(registry) < 1.2 * WHOLE
    assert all(same(registry.load(version), with_tensors(seed, table=TABLE)) for seed, version in enumerate(versions))


def test_the_same_adapter_under_two_names_is_one_file_and_is_not_cut(registry):
    registry.add(with_tensors(1, table=TABLE), "first")
    registry.add(with_tensors(1, table=TABLE), "copy")

    assert lists(registry) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_every_kind_of_tensor_is_shared_as_it_lies_in_the_file(registry, monkeypatch, dtype):
    """A re-scaled sibling: each A as before, each B another; a table's factors lie transposed.

    With odd numbers of rows, so that of one-byte floats nothing is aligned.
    """
    monkeypatch.setattr(cutting, "MIN_SHARED_BYTES", 5)
    forms = {"conv": Form(kind="conv", kernel=(3, 3)), "embed": Form(kind="embedding"), "c_fc": Form(kind="conv1d")}

    def sibling(scale: float) -> Adapter:
        generator = torch.Generator().manual_seed(3)
        sizes = {"conv": (7, 27), "embed": (11, 5), "c_fc": (9, 7), "q_proj": (5, 5)}  # [out, in]
        factors = {
            name: LowRank(
                A=torch.randn(3, size[1], generator=generator).to(dtype),
                B=(torch.randn(size[0], 3, generator=generator) * scale).to(dtype),
            )
            for name, size in sizes.items()
        }
        return make_adapter(
            factors,
            BASE,
            random_adapter().header.recipe,
            forms=forms,
            exact={"norm": torch.ones(3), "bias": torch.ones(7)},
        )

    versions = [registry.add(sibling(scale), f"name-{scale}") for scale in (1.0, 2.0)]

    stored = to_tensors(sibling(1.0))
    sizes = large_tensors(sibling(1.0).header, ((name, as_bytes(tensor)) for name, tensor in stored.items()))
    assert sizes == {digest_of(tensor): as_bytes(tensor).nbytes for tensor in stored.values()}
    assert len(lists(registry)) == 2
    for scale, version in zip((1.0, 2.0), versions, strict=True):
        parts = {part.digest for part in registry._home.store.parts(Digest(weights_of(registry, version))) or ()}
        assert {digest_of(tensor) for name, tensor in stored.items() if "lora_A" in name} <= parts
        assert digest_of(stored["base_model.model.embed.lora_embedding_B"]) in parts
        assert same(registry.load(version), sibling(scale))
    registry.reindex()  # which knows the headers alone, and reads what they do not tell
    assert registry.shared_bytes(versions[0]) > 0
    assert registry.fsck() == []


# Crashes, damage, gc


def test_gc_keeps_what_one_of_them_needs_and_takes_all_when_none_is_left(registry, pair):
    registry.remove("first")
    dry = registry.gc(dry_run=True, grace_s=0)
    wet = registry.gc(grace_s=0)

    assert (dry.removed, dry.num_bytes) == (wet.removed, wet.num_bytes)
    assert digest_of(TABLE) not in wet.removed
    assert wet.num_bytes < 0.1 * WHOLE  # the table is not freed, and is not said to be
    assert same(registry.load(pair[1]), with_tensors(2, table=TABLE))
    assert registry.shared_bytes(pair[1]) == 0
    registry.remove("second")
    assert registry.gc(grace_s=0).num_bytes > WHOLE
    assert disk_bytes(registry) == 0


def test_a_lease_keeps_the_parts_of_what_it_keeps(registry, pair):
    lease = registry.lease()
    lease.keep(pair[0])
    registry.remove("first")
    registry.remove("second")

    registry.gc(grace_s=0)

    assert same(registry.load(pair[0]), with_tensors(1, table=TABLE))
    lease.close()
    registry.gc(grace_s=0)
    assert disk_bytes(registry) == 0


def test_the_parts_of_a_write_that_is_not_named_yet_have_their_grace_time(registry, pair):
    registry.remove("first")
    registry.remove("second")
    then = time.time() - 7200
    for path in (registry.root / "blobs").rglob("*"):
        if path.suffix != ".parts":
            os.utime(path, (then, then))

    assert digest_of(TABLE) not in registry.gc().removed


def test_a_writer_whose_part_was_collected_before_it_could_name_it_writes_it_again(registry, monkeypatch):
    registry.remove(registry.add(with_tensors(1, table=TABLE), "first").name)
    registry._home.store.put([as_bytes(TABLE)])  # as an older sibling left it
    with Registry.open(registry.root) as other:

        def late(home: Home, *rest):
            home.store.delete(Digest(digest_of(TABLE)))
            return add_rows(home, *rest)

        monkeypatch.setattr("flora.registry.adding._add_rows", late)
        version = other.add(with_tensors(2, table=TABLE), "second")

    assert same(registry.load(version), with_tensors(2, table=TABLE))


def test_a_file_whose_part_was_collected_before_it_could_count_stays_whole(registry, monkeypatch):
    first = registry.add(with_tensors(1, table=TABLE), "first")

    def cut_and_lose(*args):
        parts = put_parts(*args)
        registry._home.store.delete(Digest(digest_of(TABLE)))
        return parts

    monkeypatch.setattr("flora.registry.sharing._put_parts", cut_and_lose)
    second = registry.add(with_tensors(2, table=TABLE), "second")

    assert lists(registry) == []
    assert same(registry.load(first), with_tensors(1, table=TABLE))
    assert same(registry.load(second), with_tensors(2, table=TABLE))


@pytest.mark.parametrize("damage", ["part", "rest", "list", "no part", "no list"])
def test_damage_is_found_for_each_version_that_it_strikes_and_healed_by_adding_it_again(registry, pair, damage):
    weights = weights_of(registry, pair[0])
    parts = [part.digest for part in registry._home.store.parts(Digest(weights)) or ()]
    rest = next(digest for digest in parts if digest != digest_of(TABLE))
    path = {"rest": blob_path(registry, rest), "list": Path(f"{blob_path(registry, weights)}.parts")}.get(
        damage.removeprefix("no "), blob_path(registry, digest_of(TABLE))
    )
    if damage.startswith("no "):
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.chmod(0o644)
        path.write_bytes(data)

    struck = {"first@v1", "second@v1"} if "part" in damage else {"first@v1"}
    found = registry.fsck()
    assert {problem.subject for problem in found if not problem.is_harmless} == struck
    assert {problem.kind for problem in found if not problem.is_harmless} <= {"damaged", "missing"}
    registry.gc(grace_s=0)
    for seed, name in enumerate(["first", "second"], start=1):
        assert registry.add(with_tensors(seed, table=TABLE), name).number == 1
    registry.gc(grace_s=0)
    assert registry.fsck() == []
    assert disk_bytes(registry) < 1.1 * WHOLE


def test_gc_takes_nothing_that_may_belong_to_a_list_that_it_cannot_read(registry, pair):
    (one, _) = lists(registry)
    one.chmod(0o644)
    one.write_bytes(b"[")
    before = sorted((registry.root / "blobs").rglob("*"))

    registry.gc(grace_s=0)

    assert sorted((registry.root / "blobs").rglob("*")) == before


@pytest.mark.parametrize("is_damaged", [False, True])
def test_of_a_file_that_a_crash_left_whole_and_in_parts_gc_leaves_one(registry, pair, is_damaged):
    """The parts, unless they are damaged."""
    content = b"".join(encode(to_tensors(with_tensors(1, table=TABLE))))
    registry._home.store.put([content])
    if is_damaged:
        path = blob_path(registry, digest_of(TABLE))
        path.chmod(0o644)
        path.write_bytes(b"\0" * WHOLE)
    assert ("leftover", weights_of(registry, pair[0])) in [(each.kind, each.subject) for each in registry.fsck()]
    dry = registry.gc(dry_run=True, grace_s=0)

    wet = registry.gc(grace_s=0)

    assert (dry.removed, dry.num_bytes) == (wet.removed, wet.num_bytes)
    assert blob_path(registry, weights_of(registry, pair[0])).exists() == is_damaged
    assert same(registry.load(pair[0]), with_tensors(1, table=TABLE))


def test_what_a_crash_left_uncut_the_next_gc_cuts(registry, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("flora.registry.adding.share", lambda home, weights: None)
        versions = [registry.add(with_tensors(seed, table=TABLE), f"name-{seed}") for seed in range(3)]
    assert disk_bytes(registry) > 3 * WHOLE
    dry = registry.gc(dry_run=True, grace_s=0)
    assert disk_bytes(registry) > 3 * WHOLE

    wet = registry.gc(grace_s=0)

    assert dry.num_shared_bytes == wet.num_shared_bytes == 2 * WHOLE
    assert disk_bytes(registry) < 1.2 * WHOLE
    assert all(same(registry.load(version), with_tensors(seed, table=TABLE)) for seed, version in enumerate(versions))
    assert registry.gc(grace_s=0).num_shared_bytes == 0
    assert registry.fsck() == []


def test_a_disk_that_is_full_when_files_are_cut_keeps_them_whole_and_says_so(registry, monkeypatch, caplog):
    first = registry.add(with_tensors(1, table=TABLE), "first")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr("flora.registry.sharing.put_cut", lambda *args: registry._home.store.put(fail() for _ in "x"))
        second = registry.add(with_tensors(2, table=TABLE), "second")

    assert "not shared" in caplog.text
    assert lists(registry) == []
    assert same(registry.load(first), with_tensors(1, table=TABLE))
    assert same(registry.load(second), with_tensors(2, table=TABLE))


# Several at once


def test_a_reader_that_looked_before_the_file_was_cut_looks_again(registry, monkeypatch):
    first = registry.add(with_tensors(1, table=TABLE), "first")
    store = registry._home.store
    stale = store.spans(Digest(weights_of(registry, first)))
    registry.add(with_tensors(2, table=TABLE), "second")
    assert not stale[0].path.exists()
    real = store.spans
    weights = Digest(weights_of(registry, first))
    looks = iter([stale, None, stale, None])  # who checks the file, and who maps it: each finds it gone once

    monkeypatch.setattr(store, "spans", lambda digest: (digest == weights and next(looks)) or real(digest))

    assert same(registry.load(first), with_tensors(1, table=TABLE))
    assert list(looks) == []


def test_writers_of_siblings_at_one_moment_store_what_they_share_once(registry):
    def add(seed: int) -> Version:
        with Registry.open(registry.root) as own:
            return own.add(with_tensors(seed, table=TABLE), f"name-{seed}")

    with ThreadPoolExecutor(4) as writers:
        versions = list(writers.map(add, range(12)))

    assert all(same(registry.load(version), with_tensors(seed, table=TABLE)) for seed, version in enumerate(versions))
    registry.gc(grace_s=0)
    assert disk_bytes(registry) < 1.3 * WHOLE
    assert len(lists(registry)) == 12
    assert registry.fsck() == []


# Registries of earlier versions


def add_again(registry: Registry) -> None:
    assert [registry.add(with_tensors(seed, table=TABLE), f"name-{seed}").number for seed in range(2)] == [1, 1]


@pytest.mark.parametrize("mend", [Registry.reindex, add_again])
def test_a_registry_of_the_first_schema_is_read_as_it_is_and_shares_once_its_tensors_are_noted(tmp_path, mend):
    """Its tables are those of the first migration, its blobs all whole."""
    folder = tmp_path / "registry"
    with Registry.open(folder) as made, pytest.MonkeyPatch.context() as patch:
        patch.setattr("flora.registry.adding.share", lambda home, weights: None)
        versions = [made.add(with_tensors(seed, table=TABLE), f"name-{seed}") for seed in range(2)]
    turn_back_to_first_schema(folder / "index.sqlite")

    with Registry.open(folder) as opened:
        assert [opened.resolve(version.name) for version in versions] == versions
        assert opened.fsck() == []
        assert opened.gc(grace_s=0).removed == ()
        assert lists(opened) == []
        mend(opened)
        assert opened.gc(grace_s=0).num_shared_bytes == (WHOLE if mend is Registry.reindex else 0)
        assert disk_bytes(opened) < 1.1 * WHOLE
        assert all(same(opened.load(version), with_tensors(seed, table=TABLE)) for seed, version in enumerate(versions))


def turn_back_to_first_schema(index: Path) -> None:
    """Moves the rows into tables that the first migration makes, and no other one."""
    now = index.with_suffix(".now")
    index.rename(now)
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).parent / "migrations"))
    engine = database.sa.create_engine(f"sqlite:///{index}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    engine.dispose()
    with sqlite3.connect(index) as old:
        old.execute("ATTACH ? AS now", [str(now)])
        for (table,) in old.execute("SELECT name FROM main.sqlite_schema WHERE type = 'table'").fetchall():
            if table not in ("alembic_version", "sqlite_sequence"):
                columns = ", ".join(row[1] for row in old.execute(f"PRAGMA main.table_info({table})"))
                old.execute(f"INSERT INTO main.{table} ({columns}) SELECT {columns} FROM now.{table}")
        assert old.execute("SELECT version_num FROM alembic_version").fetchall() == [("0001",)]
    now.unlink()


def test_the_smallest_tensor_that_is_shared_is_one_mebibyte():
    assert MIN_SHARED_BYTES == WHOLE == as_bytes(TABLE).nbytes
    assert Q_PROJ in random_adapter().factors
