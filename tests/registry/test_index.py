"""The index as SQL: its migrations, its tables, its journal mode."""

import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

import flora.registry.database as database
from flora.errors import RegistryError, StoreError
from flora.registry import Registry
from flora.registry.database import HEAD, Database, journal_mode
from flora.registry.listing import entries
from flora.registry.tables import metadata
from tests.registry.adapters import random_adapter

MIGRATIONS = Path(database.__file__).parent / "migrations"


def open_index(file: Path) -> Database:
    return Database(file, fill=lambda connection: None)


def test_the_migrations_lead_to_the_tables(tmp_path):
    index = open_index(tmp_path / "index.sqlite")

    with index.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        made = dict(connection.exec_driver_sql("SELECT name, sql FROM sqlite_schema").all())
    for table in metadata.tables.values():
        assert "STRICT" in made[table.name]
        assert normal(made[table.name]) == normal(str(sa.schema.CreateTable(table).compile(index._engine)))


def normal(statement: str) -> list[str]:
    return sorted(part.strip() for part in statement.replace("\n", " ").split(","))


def test_the_newest_migration_is_the_one_that_the_code_expects():
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))

    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


def test_an_index_of_a_newer_flora_is_refused(tmp_path):
    Registry.open(tmp_path).close()
    with sqlite3.connect(tmp_path / "index.sqlite") as index:
        index.execute("UPDATE alembic_version SET version_num = '9999'")

    with pytest.raises(RegistryError, match="newer Flora"):
        Registry.open(tmp_path)


def test_a_migration_that_fails_leaves_no_tables(tmp_path, monkeypatch):
    def break_down(connection: sa.Connection) -> None:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        Database(tmp_path / "index.sqlite", fill=break_down)
    with sqlite3.connect(tmp_path / "index.sqlite") as index:
        assert index.execute("SELECT name FROM sqlite_schema").fetchall() == []
    open_index(tmp_path / "index.sqlite")


@pytest.mark.parametrize(
    ("version", "mode"),
    [
        ((3, 40, 1), "delete"),
        ((3, 44, 5), "delete"),
        ((3, 44, 6), "wal"),
        ((3, 45, 0), "delete"),
        ((3, 50, 6), "delete"),
        ((3, 50, 7), "wal"),
        ((3, 51, 0), "delete"),
        ((3, 51, 2), "delete"),
        ((3, 51, 3), "wal"),
        ((3, 52, 0), "wal"),
    ],
)
def test_wal_is_used_only_where_sqlite_has_the_fix_of_its_reset(version, mode):
    assert journal_mode(version) == mode


def test_connections_are_set_up_for_several_writers(tmp_path):
    index = open_index(tmp_path / "index.sqlite")

    with index.reading() as connection:
        settings = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "foreign_keys", "synchronous", "busy_timeout")
        }
    assert settings == {"journal_mode": journal_mode(), "foreign_keys": 1, "synchronous": 2, "busy_timeout": 30_000}


def test_an_index_that_another_process_holds_too_long_is_an_error_with_a_fix(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "BUSY_TIMEOUT_MS", 50)
    with Registry.open(tmp_path) as registry:
        registry.add(random_adapter(), "sql")
        other = sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")

        with pytest.raises(StoreError, match="cannot be used") as refused:
            registry.add(random_adapter(1), "sql")
        assert "another process" in refused.value.cause
        assert registry.resolve("sql").number == 1  # readers go on

        other.execute("ROLLBACK")
        assert registry.add(random_adapter(1), "sql").number == 2


def test_a_page_takes_as_much_work_whichever_it_is_and_however_many_names_there_are(tmp_path):
    """Counted in instructions of SQLite's machine, and with no clock."""
    with Registry.open(tmp_path) as registry:
        registry.add(random_adapter(), "m/00000")
        few = instructions_of_a_page(registry, after="", prefix="")
        with sqlite3.connect(tmp_path / "index.sqlite") as other:
            columns = [
                row[1] for row in other.execute("PRAGMA table_info(versions)") if row[1] not in ("id", "name_id")
            ]
            kept = ", ".join(columns)
            for number in range(1, 2000):
                (name_id,) = other.execute(
                    "INSERT INTO names (name, next_number) VALUES (?, 2) RETURNING id", [f"m/{number:05}"]
                ).fetchone()
                other.execute(
                    f"INSERT INTO versions (name_id, {kept}) SELECT ?, {kept} FROM versions LIMIT 1", [name_id]
                )

        for prefix, after in (("", ""), ("", "m/01500"), ("m/", "m/01500"), ("m/01", "m/00002")):
            assert instructions_of_a_page(registry, after, prefix) < 20 * few


def instructions_of_a_page(registry: Registry, after: str, prefix: str) -> int:
    """Hundreds of instructions that the ten names of a page take."""
    hundreds = 0

    def count() -> None:
        nonlocal hundreds
        hundreds += 1

    with registry._home.reading() as connection:
        driver = connection.connection.driver_connection
        driver.set_progress_handler(count, 100)
        entries(connection, prefix, 10, after)
        driver.set_progress_handler(None, 0)
    return hundreds


def test_a_read_only_registry_can_be_read(tmp_path):
    with Registry.open(tmp_path / "registry") as registry:
        version = registry.add(random_adapter(), "sql")
    uri = f"file:{tmp_path}/registry/index.sqlite?mode=ro"
    with sqlite3.connect(uri, uri=True) as index:
        assert index.execute("SELECT digest FROM versions").fetchone() == (version.digest,)
