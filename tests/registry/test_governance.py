"""Protected aliases, requirements, labels, search, lineage, events, leases."""

import json
import os
import signal
import sqlite3
import subprocess
import sys

import msgspec
import pytest

from flora.adapter import CHAT_TEMPLATE, BaseBinding, ChangeReport, Recipe, TensorChange, make_adapter, to_json
from flora.canonical import canonical_json
from flora.errors import AdapterNotFound, NameInvalid, UsageError
from flora.identity import BaseRecord, TensorRecord
from flora.registry import Registry, Search, Version
from flora.registry.binding import bind
from flora.registry.journal import Added, Labeled, Mismatched, Moved, Protected, Removed
from flora.registry.requirements import parse_requirement, unmet
from tests.registry.adapters import BASE, Q_PROJ, SHAPES, random_adapter

RECORD = BaseRecord(
    tuple(
        TensorRecord(f"{name}.weight", "BF16", SHAPES[name], f"{index:064x}")
        for index, name in enumerate(sorted(SHAPES, key=lambda name: name != Q_PROJ))
    )
)


def version_with(registry: Registry, kept: float, name: str = "sql", **recipe: object):
    """A version that keeps that share of its only tensor's change."""
    adapter = random_adapter(ranks={Q_PROJ: 4})
    change = TensorChange(
        name=f"{Q_PROJ}.weight", shape=(32, 32), status="extracted", norm_squared=1, kept=kept, rank=4
    )
    made = Recipe(**({"operation": "extract"} | recipe))
    return registry.add(make_adapter(adapter.factors, BASE, made, ChangeReport(tensors=(change,))), name)


# Protected aliases


def test_a_protected_alias_moves_only_by_force(registry):
    first, second = (registry.add(random_adapter(seed), "sql") for seed in (0, 1))
    registry.set_alias("sql", "prod", first)
    registry.protect("sql", "prod")

    with pytest.raises(UsageError, match=r"sql:prod is protected, and stays at sql@v1"):
        registry.set_alias("sql", "prod", second)
    registry.set_alias("sql", "prod", second, force=True, reason="the pager rang")

    assert registry.resolve("sql:prod") == second
    assert registry.history("sql", "prod")[-1].reason == "the pager rang"
    registry.protect("sql", "prod", is_protected=False)
    registry.set_alias("sql", "prod", first)


def test_adding_to_a_protected_alias_is_refused_and_leaves_no_version(registry):
    registry.set_alias("sql", "prod", registry.add(random_adapter(0), "sql"))
    registry.protect("sql", "prod")

    with pytest.raises(UsageError, match="protected"):
        registry.add(random_adapter(1), "sql", alias="prod")

    assert len(registry.versions("sql")) == 1


def test_latest_cannot_be_protected(registry):
    registry.add(random_adapter(), "sql")

    with pytest.raises(UsageError, match="latest"):
        registry.protect("sql", "latest")


# Requirements


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("energy>=0.9", True),
        ("energy>=0.91", False),
        ("energy > 0.9", False),
        ("module_energy>=0.9", True),
        ("rank<=4", True),
        ("rank<4", False),
        ("modules=1", True),
        ("bytes<=10", False),
    ],
)
def test_a_requirement_is_a_bound_on_a_figure(registry, text, holds):
    version = version_with(registry, kept=0.9)

    assert (unmet(parse_requirement(text), version, registry.report(version)) is None) is holds


def test_an_import_meets_no_bound_on_energy(registry):
    version = version_with(registry, kept=1.0, operation="import")

    assert "never measured" in str(unmet(parse_requirement("energy>=0"), version, registry.report(version)))


def is_proven(registry: Registry, version: Version) -> bool:
    met = unmet(parse_requirement("base=proven"), version, None, is_base_proven=registry.is_base_proven(version))
    return met is None


def test_a_base_that_is_only_claimed_is_not_proven(registry):
    claimed = random_adapter(base=BaseBinding(name="org/tiny", base_id=None))

    assert unmet(parse_requirement("base=proven"), registry.add(claimed, "sql"), None)
    assert not is_proven(registry, registry.add(claimed, "sql"))


def test_a_base_is_proven_once_its_own_record_is_registered(registry, tmp_path):
    """Until then its id is what the author of the folder wrote."""
    bound = bind(random_adapter(), RECORD, "org/tiny")
    version = registry.add(bound, "sql")
    assert "only claimed, as sha256:" in str(unmet(parse_requirement("base=proven"), version, None))
    assert not is_proven(registry, version)

    registry.register_base(RECORD, name="org/tiny", path=tmp_path)

    assert is_proven(registry, version)


def test_a_record_that_an_adapter_brings_along_proves_nothing(registry):
    """What it carries is a blob under its digest, and so would be a record that its author made up."""
    base = BaseBinding(name="org/tiny", base_id=str(RECORD.base_id))
    made_up = canonical_json(to_json(RECORD))

    version = registry.add(random_adapter(base=base, extras={CHAT_TEMPLATE: made_up}), "sql")

    assert registry.base_record(str(RECORD.base_id)) == RECORD  # it is there
    assert not is_proven(registry, version)


@pytest.mark.parametrize(
    "tensors", [RECORD.tensors[1:], (TensorRecord(f"{Q_PROJ}.weight", "BF16", (32, 31), "0" * 64), *RECORD.tensors[1:])]
)
def test_a_registered_base_that_has_no_place_for_the_adapter_does_not_prove_it(registry, tmp_path, tensors):
    other = BaseRecord(tensors)
    registry.register_base(other, name="org/other", path=tmp_path)

    version = registry.add(random_adapter(base=BaseBinding(name="org/other", base_id=str(other.base_id))), "sql")

    assert not is_proven(registry, version)


def test_a_registered_base_with_other_weights_than_it_was_made_from_does_not_prove_it(registry, tmp_path):
    registry.register_base(RECORD, name="org/tiny", path=tmp_path)
    bound = bind(random_adapter(), RECORD, "org/tiny")
    touched = bound.header.base.touched | {f"{Q_PROJ}.weight": "f" * 64}
    base = msgspec.structs.replace(bound.header.base, touched=touched)

    version = registry.add(random_adapter(base=base), "sql")

    assert not is_proven(registry, version)


@pytest.mark.parametrize("text", ["", "energy", "energy>=", "energy>=x", "speed>1", "base=claimed", "energy>=0.9;rm"])
def test_what_is_no_requirement_is_a_usage_error(text):
    with pytest.raises(UsageError):
        parse_requirement(text)


# Labels and search


def test_labels_are_noted_changed_and_taken_away(registry):
    version = registry.add(random_adapter(), "sql")
    registry.set_labels(version, {"team": "data", "task": "sql"})

    registry.set_labels(version, {"team": "search", "task": None})

    assert registry.labels(version) == {"team": "search"}


@pytest.mark.parametrize(("key", "value"), [("", "x"), ("a b", "x"), ("-a", "x"), ("a", "x" * 257), ("a", "\x1b[0m")])
def test_what_cannot_be_a_label_is_refused(registry, key, value):
    version = registry.add(random_adapter(), "sql")

    with pytest.raises(NameInvalid):
        registry.set_labels(version, {key: value})


def test_search_fits_all_that_is_wanted(registry):
    low, high = version_with(registry, 0.5, "team/low"), version_with(registry, 0.95, "team/High_1")
    registry.set_labels(high, {"task": "SQL"})

    def found(**wanted: object) -> list[str]:
        return [version.name for version in registry.search(Search(**wanted))]

    assert found() == sorted([low.name, high.name])
    assert found(text="HIGH") == [high.name]
    assert found(text="sql") == [high.name]  # a label's value
    assert found(text="h_1") == [high.name]  # taken as it stands, no wildcard
    assert found(text="%") == []
    assert found(text="ORG/tiny") == sorted([low.name, high.name])
    assert found(labels={"task": None}) == [high.name]
    assert found(labels={"task": "python"}) == []
    assert found(min_energy=0.9) == [high.name]
    assert found(base=str(BASE.base_id), max_rank=3) == []
    assert found(operation="prune") == []


# Lineage


def test_lineage_goes_back_to_base_and_tuned(registry):
    first = version_with(registry, 0.9, tuned_name="org/tuned", tuned_id="sha256:" + "c" * 64)
    pruned = version_with(registry, 0.8, operation="prune", parents=(first.digest,))
    other = version_with(registry, 0.7, "other")
    merged = version_with(registry, 0.6, "both", operation="merge", parents=(pruned.digest, other.digest))

    line = registry.lineage(merged)

    assert [parent.version.ref for parent in line.parents] == ["sql@v2", "other@v1"]
    (origin,) = line.parents[0].parents
    assert (origin.version.ref, origin.tuned, origin.base) == ("sql@v1", "org/tuned", "org/tiny")


def test_a_removed_parent_is_known_by_its_digest(registry):
    first = version_with(registry, 0.9)
    pruned = version_with(registry, 0.8, operation="prune", parents=(first.digest,))
    registry.remove("sql@v1", force=True)
    registry.gc(grace_s=0)

    (parent,) = registry.lineage(pruned).parents

    assert (parent.digest, parent.version, parent.parents) == (first.digest, None, ())


# Events


def test_events_tell_what_happened_after_a_cursor(registry):
    first = registry.add(random_adapter(), "sql")
    events = list(registry.events())
    assert [type(event.change) for event in events] == [Added, Moved]
    cursor = events[-1].cursor

    registry.set_alias("sql", "prod", first)
    registry.protect("sql", "prod")
    registry.set_labels(first, {"a": "b"})
    registry.remove("sql", force=True)

    changes = [event.change for event in registry.events(cursor)]
    assert [type(change) for change in changes] == [Moved, Protected, Labeled, Moved, Moved, Removed]
    assert list(registry.events(list(registry.events())[-1].cursor)) == []


def test_a_line_that_is_still_being_written_is_left_for_the_next_call(registry):
    registry.add(random_adapter(), "sql")
    whole = list(registry.events())
    journal = registry.root / "journal.jsonl"
    data = journal.read_bytes()
    journal.write_bytes(data[:-10])

    before = list(registry.events())
    journal.write_bytes(data)

    assert before == whole[:-1]
    assert list(registry.events(before[-1].cursor)) == whole[-1:]


def test_a_rebuilt_index_has_labels_and_protections_again(registry):
    version = registry.add(random_adapter(), "sql")
    registry.set_alias("sql", "prod", version)
    registry.protect("sql", "prod")
    registry.set_labels(version, {"team": "data"})

    registry.reindex()

    assert registry.protected("sql") == {"prod"}
    assert registry.labels(registry.resolve("sql")) == {"team": "data"}


def test_an_index_of_the_first_schema_is_brought_up_to_date(tmp_path):
    """0001 is the first: taken back by hand, with what it held."""
    with Registry.open(tmp_path) as registry:
        version = registry.add(random_adapter(), "sql")
    with sqlite3.connect(tmp_path / "index.sqlite") as index:
        index.executescript(
            "DROP TABLE labels; DROP TABLE protections; DROP TABLE mismatches; DROP TABLE weights_tensors;"
            "ALTER TABLE version_blobs DROP COLUMN blake3;"
            "UPDATE alembic_version SET version_num='0001'"
        )

    with Registry.open(tmp_path) as registry:
        assert registry.resolve("sql") == version
        registry.set_labels(version, {"a": "b"})
        assert registry.fsck() == []


# Mismatches

OTHER_BASE = "sha256:" + "f" * 64


def test_a_version_served_on_another_base_is_noted_once_for_good(registry):
    version = registry.add(random_adapter(), "sql")
    cursor = list(registry.events())[-1].cursor

    for _ in range(2):
        registry.allow_mismatch(version, OTHER_BASE)

    (noted,) = registry.mismatches(version)
    (told,) = [event.change for event in registry.events(cursor)]
    assert (noted.base_id, noted.actor) == (OTHER_BASE, registry.history("sql", "latest")[0].actor)
    assert isinstance(told, Mismatched)
    assert (told.name, told.number, told.base_id, told.actor) == ("sql", 1, OTHER_BASE, noted.actor)
    registry.reindex()
    assert registry.mismatches(version) == [noted]
    assert registry.fsck() == []


def test_a_mismatch_of_a_version_that_was_removed_is_not_allowed(registry):
    version = registry.add(random_adapter(), "sql")
    registry.remove("sql")

    with pytest.raises(AdapterNotFound):
        registry.allow_mismatch(version, OTHER_BASE)


# Leases

HOLD = """
import sys
from flora.registry import Registry
registry = Registry.open(sys.argv[1])
lease = registry.lease()
lease.keep(registry.by_digest(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_process_that_dies_gives_its_lease_back(registry):
    version = registry.add(random_adapter(), "sql")
    command = [sys.executable, "-c", HOLD, str(registry.root), version.digest]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    registry.remove("sql", force=True)

    kept = registry.gc(grace_s=0)
    assert kept.removed == ()
    assert kept.kept_leased == 3  # manifest, weights, report
    assert registry.load(version).header == random_adapter().header

    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert len(registry.gc(grace_s=0, dry_run=True).removed) == 3
    assert len(registry.gc(grace_s=0).removed) == 3
    assert list((registry.root / "leases").iterdir()) == []


def test_a_removed_version_is_found_by_its_digest_while_somebody_holds_a_lease_of_it(registry):
    version = registry.add(random_adapter(), "sql")
    registry.allow_mismatch(version, OTHER_BASE)
    lease = registry.lease()
    lease.keep(version)
    registry.remove("sql", force=True)
    registry.gc(grace_s=0)

    with Registry.open(registry.root) as other:
        found = other.leased(version.digest)
        assert found == version
        other.allow_mismatch(found, OTHER_BASE)  # it was, while the version was there, and that is not forgotten
        with pytest.raises(AdapterNotFound):
            other.allow_mismatch(found, "sha256:" + "d" * 64)
        with pytest.raises(AdapterNotFound):
            other.by_digest(version.digest)  # for everybody else it is gone
        lease.close()
        assert other.leased(version.digest) is None


def test_a_lease_that_nobody_holds_still_has_its_grace_time(registry):
    version = registry.add(random_adapter(), "sql")
    lease = registry.lease()
    lease.keep(version)
    lease._file.close()  # as it looks from a machine that does not see the lock
    registry.remove("sql", force=True)

    assert registry.gc(grace_s=60).removed == ()
    assert len(registry.gc(grace_s=0).removed) == 3


def test_events_are_json_lines_that_other_tools_read(registry):
    registry.add(random_adapter(), "sql")

    lines = [json.loads(line) for line in (registry.root / "journal.jsonl").read_text().splitlines()]
    assert [line["change"]["op"] for line in lines] == ["add", "alias"]
