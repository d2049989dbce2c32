"""What a server loads is checked by its BLAKE3 where the index knows it, and by its sha256 where it does not."""

import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa

from flora.adapter import make_adapter
from flora.errors import StoreError
from flora.lowrank import LowRank
from flora.names import Digest
from flora.registry import Registry, Version, cutting
from flora.registry.database import BUSY_TIMEOUT_MS
from flora.registry.tables import version_blobs
from flora.registry.verified import Verified
from tests.registry.adapters import random_adapter
from tests.registry.test_sharing import same


def load_anew(registry: Registry, version: Version) -> None:
    """As a process does that has read nothing yet."""
    registry._home.store._verified = Verified()
    with registry.loading(version) as adapter:
        assert same(adapter, random_adapter())


def noted(registry: Registry) -> list[str]:
    with registry._home.reading() as connection:
        query = sa.select(version_blobs.c.blake3).where(version_blobs.c.blake3.is_not(None))
        return list(connection.execute(query).scalars())


def forget(registry: Registry, blake3: str | None = None) -> None:
    with registry._home.writing() as connection:
        update = version_blobs.update().where(version_blobs.c.blake3.is_not(None))
        connection.execute(update.values(blake3=blake3))


def weights_path(registry: Registry, version: Version) -> Path:
    (span,) = registry._home.store.spans(Digest(registry._home.manifest(version).weights.digest))
    return span.path


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


def forbid_sha256(monkeypatch) -> None:
    """Of weights: nothing is to be read for it."""
    monkeypatch.setattr("flora.registry.verified._cut", lambda _: pytest.fail("it was read for its sha256"))


def test_weights_are_checked_without_their_sha256(registry, monkeypatch):
    version = registry.add(random_adapter(), "sql")
    forbid_sha256(monkeypatch)

    load_anew(registry, version)
    forget(registry)
    with pytest.raises(pytest.fail.Exception):
        load_anew(registry, version)


@pytest.mark.parametrize("place", [0, 9, 500, -1])
def test_a_byte_that_changed_is_found_by_every_process_that_reads_it_first(registry, place):
    version = registry.add(random_adapter(), "sql")
    load_anew(registry, version)

    flip(weights_path(registry, version), place)

    for _ in range(2):
        with pytest.raises(StoreError, match="damaged"):
            load_anew(registry, version)


def test_bytes_that_are_missing_are_found(registry):
    version = registry.add(random_adapter(), "sql")
    path = weights_path(registry, version)
    data = path.read_bytes()

    path.chmod(0o600)
    for kept in (data[:-1], data[:3], b""):
        path.write_bytes(kept)
        with pytest.raises(StoreError, match="damaged"):
            load_anew(registry, version)


def test_a_wrong_blake3_refuses_nothing_and_is_corrected(registry):
    version = registry.add(random_adapter(), "sql")
    right = noted(registry)

    forget(registry, "0" * 64)
    load_anew(registry, version)

    assert noted(registry) == right


def test_a_wrong_blake3_lets_no_damage_through(registry):
    version = registry.add(random_adapter(), "sql")
    forget(registry, "0" * 64)
    flip(weights_path(registry, version), -1)

    with pytest.raises(StoreError, match="damaged"):
        load_anew(registry, version)
    assert noted(registry) == ["0" * 64]


def test_a_registry_of_an_earlier_flora_learns_a_blake3_when_it_is_first_loaded(tmp_path):
    with Registry.open(tmp_path) as registry:
        version = registry.add(random_adapter(), "sql")
        right = noted(registry)
    with sqlite3.connect(tmp_path / "index.sqlite") as index:
        index.execute("ALTER TABLE version_blobs DROP COLUMN blake3")
        index.execute("UPDATE alembic_version SET version_num = '0004'")

    with Registry.open(tmp_path) as registry:
        assert noted(registry) == []
        load_anew(registry, version)

        assert noted(registry) == right
        assert registry.fsck() == []


def test_an_index_made_anew_learns_it_likewise(registry):
    version = registry.add(random_adapter(), "sql")
    right = noted(registry)

    registry.reindex()
    assert noted(registry) == []
    load_anew(registry, version)

    assert noted(registry) == right


def test_a_load_does_not_wait_to_note_it_while_another_writes(registry):
    version = registry.add(random_adapter(), "sql")
    forget(registry)

    with registry._home.writing():
        load_anew(registry, version)
    assert noted(registry) == []

    load_anew(registry, version)
    assert len(noted(registry)) == 1
    with registry._home.reading() as connection:  # whoever writes next waits as long as ever
        if connection.dialect.name == "sqlite":
            assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == BUSY_TIMEOUT_MS


def test_a_version_that_was_removed_while_it_is_in_use_loads_without_a_note(registry):
    version = registry.add(random_adapter(), "sql")
    registry.remove("sql", force=True)

    load_anew(registry, version)
    assert noted(registry) == []


def test_weights_in_parts_are_checked_by_the_same_blake3(registry, monkeypatch):
    monkeypatch.setattr(cutting, "MIN_SHARED_BYTES", 64)
    adapter = random_adapter()
    version = registry.add(adapter, "sql")
    before = noted(registry)
    doubled = {name: LowRank(A=factors.A, B=factors.B * 2) for name, factors in adapter.factors.items()}
    registry.add(make_adapter(doubled, adapter.header.base, adapter.header.recipe), "sibling")
    assert len(list((registry.root / "blobs").rglob("*.parts"))) == 2
    forbid_sha256(monkeypatch)

    load_anew(registry, version)

    assert before[0] in noted(registry)
    assert len(noted(registry)) == 2
