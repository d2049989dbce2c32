"""The conformance suite: every backend passes it, and a backend that breaks a promise does not."""

import pytest

from flora.registry import Registry, aliases
from flora.registry.conformance import run
from flora.registry.promises import PROMISES
from tests.registry.postgres import find_binaries, serve_postgres


def failures(url: str) -> dict[str, str]:
    results = list(run(url))
    assert len(results) == len(PROMISES)
    return {result.promise: result.failure for result in results if result.failure is not None}


def test_sqlite_keeps_every_promise_and_is_left_as_it_was(tmp_path):
    assert failures(str(tmp_path)) == {}

    with Registry.open(tmp_path) as registry:
        assert registry.names() == []
        assert [problem for problem in registry.fsck() if not problem.is_harmless] == []


def test_postgresql_keeps_every_promise(tmp_path):
    if (binaries := find_binaries()) is None:
        pytest.skip("no PostgreSQL on this machine")
    with serve_postgres(binaries) as url:
        assert failures(f"{url}&blobs={tmp_path}") == {}


def test_a_backend_without_compare_and_set_is_found_out(tmp_path, monkeypatch):
    right = aliases.set_alias
    monkeypatch.setattr(
        aliases,
        "set_alias",
        lambda home, name, alias, version, expected, reason, **options: right(
            home, name, alias, version, aliases.UNSET, reason, **options
        ),
    )

    found = failures(str(tmp_path))

    assert {promise.partition(" ")[0] for promise in found} == {"An", "Of"}  # it moves from anywhere, and many win
