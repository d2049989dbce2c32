"""The registry's own tests again, with PostgreSQL for an index; and what only several machines can do to it."""

import inspect
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from flora.errors import StoreError, UsageError
from flora.registry import Registry
from flora.registry.place import locate
from flora.registry.tables import metadata
from tests.registry import test_governance, test_loading, test_references, test_registry
from tests.registry.adapters import random_adapter
from tests.registry.postgres import find_binaries, serve_postgres

BINARIES = find_binaries()
pytestmark = pytest.mark.skipif(BINARIES is None, reason="no PostgreSQL on this machine")

_OF_A_FOLDER = {"test_listing_and_resolving_import_no_torch"}  # which open the registry's folder themselves

for _module in (test_registry, test_references, test_governance, test_loading):
    for _name, _test in vars(_module).items():
        if _name in _OF_A_FOLDER:
            continue
        if _name.startswith("test_") and {"registry", "three"} & set(inspect.signature(_test).parameters):
            globals()[_name] = _test


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    assert BINARIES is not None
    with serve_postgres(BINARIES) as url:
        yield url


@pytest.fixture
def url(server, tmp_path) -> str:
    """A schema of its own in that server, and a folder for blobs."""
    schema = f"s{uuid.uuid4().hex}"
    engine = sa.create_engine(server.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {schema}")
    engine.dispose()
    return f"{server}&options=-csearch_path%3D{schema}&blobs={tmp_path / 'registry'}"


@pytest.fixture
def registry(url) -> Iterator[Registry]:
    with Registry.open(url) as opened:
        yield opened


def test_the_migrations_lead_to_the_tables(registry):
    with registry._home.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_several_machines_lose_nothing(url):
    """Each worker opens the registry for itself, as another machine would."""

    def add(seed: int) -> int:
        with Registry.open(url) as registry:
            return registry.add(random_adapter(seed), "sql").number

    with ThreadPoolExecutor(8) as workers:
        numbers = list(workers.map(add, range(24)))

    assert sorted(numbers) == list(range(1, 25))
    with Registry.open(url) as registry:
        assert registry.fsck() == []
        assert len(registry.versions("sql")) == 24


def test_names_are_in_the_order_of_their_bytes(registry):
    for name in ("b", "B", "a_", "a-x", "aa"):
        registry.add(random_adapter(), name)

    assert [entry.name for entry in registry.names()] == ["B", "a-x", "a_", "aa", "b"]
    assert [entry.name for entry in registry.names(prefix="a")] == ["a-x", "a_", "aa"]


def test_a_lost_database_is_made_anew_from_the_journal(url, registry):
    version = registry.add(random_adapter(), "sql")
    with registry._home._database._engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE alembic_version")
        for table in reversed(metadata.sorted_tables):
            connection.exec_driver_sql(f"DROP TABLE {table.name}")
    registry.close()

    with Registry.open(url) as again:
        assert again.resolve("sql") == version
        assert again.add(random_adapter(1), "sql").number == 2
        assert again.fsck() == []


def test_a_server_that_is_not_there_is_an_error_of_ours(tmp_path):
    with pytest.raises(StoreError, match="index") as refused:
        Registry.open(f"postgresql://flora:secret@/db?host={tmp_path}&blobs={tmp_path}")
    assert "secret" not in str(refused.value)


def test_a_url_says_where_the_blobs_lie(tmp_path):
    root, index = locate(f"postgresql://host/db?blobs={tmp_path}&sslmode=require")

    assert root == tmp_path
    assert index == "postgresql+psycopg://host/db?sslmode=require"
    with pytest.raises(UsageError):
        locate("mysql://host/db")
