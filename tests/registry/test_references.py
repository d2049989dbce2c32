"""Names in the registry: references, aliases and their history, listings."""

import pytest

from flora.errors import AdapterNotFound, AliasConflict, NameInvalid, UsageError
from flora.names import parse_reference
from flora.prune import prune
from flora.rank import RankRule
from tests.registry.adapters import random_adapter

# References


def test_every_form_of_reference_resolves(registry, three):
    registry.set_alias("sql", "canary", three[1])

    assert registry.resolve("sql") == three[2]
    assert registry.resolve("sql:latest") == three[2]
    assert registry.resolve("sql:canary") == three[1]
    assert registry.resolve("sql@v1") == three[0]
    assert registry.resolve(f"sql@{three[0].digest}") == three[0]
    assert registry.resolve(parse_reference("sql@v2")) == three[1]
    assert registry.by_digest(three[1].digest) == three[1]


def test_a_bare_name_means_prod_where_there_is_one(registry, three):
    registry.set_alias("sql", "prod", three[0])

    assert registry.resolve("sql") == three[0]
    assert registry.resolve("sql:latest") == three[2]


def test_what_is_not_there_is_said_with_what_is(registry, three):
    with pytest.raises(AdapterNotFound) as refused:
        registry.resolve("sqll")
    assert refused.value.near == ["sql"]
    assert "did you mean sql?" in refused.value.fix
    with pytest.raises(AdapterNotFound, match=r"there is no sql:canary") as refused:
        registry.resolve("sql:canary")
    assert "latest" in refused.value.fix
    with pytest.raises(AdapterNotFound, match=r"there is no sql@v9"):
        registry.resolve("sql@v9")
    with pytest.raises(AdapterNotFound):
        registry.resolve(f"chat@{three[0].digest}")
    with pytest.raises(AdapterNotFound):
        registry.by_digest("sha256:" + "0" * 64)
    with pytest.raises(AdapterNotFound):
        registry.versions("nobody")


def test_a_name_without_prod_and_latest_says_how_to_reach_it(registry):
    registry.add(random_adapter(), "sql", alias=None)

    with pytest.raises(AdapterNotFound, match="neither an alias prod nor an alias latest") as refused:
        registry.resolve("sql")
    assert "sql@v1" in refused.value.fix


@pytest.mark.parametrize("text", ["../x", "/etc/passwd", "sql@sha256:zz", "sql:../../x", "http://host/x", ""])
def test_a_path_is_no_reference(registry, text):
    with pytest.raises(NameInvalid):
        registry.resolve(text)


# Aliases


def test_pruning_adds_a_version_and_moves_no_alias(registry):
    parent = registry.add(random_adapter(), "sql")

    child = registry.add(prune(registry.load(parent), RankRule(max_rank=1), parent.digest), "sql", alias=None)

    assert child.number == 2
    assert child.parents == (parent.digest,)
    assert child.operation == "prune"
    assert registry.resolve("sql") == parent


def test_an_alias_moves_only_from_where_it_was_read(registry, three):
    registry.set_alias("sql", "prod", three[0], expected=None, reason="first release")

    with pytest.raises(AliasConflict) as refused:
        registry.set_alias("sql", "prod", three[1], expected=None)
    assert refused.value.current == three[0].digest
    with pytest.raises(AliasConflict):
        registry.set_alias("sql", "prod", three[1], expected=three[2].digest)
    assert registry.aliases("sql")["prod"] == three[0]

    registry.set_alias("sql", "prod", three[1], expected=three[0].digest)
    assert registry.aliases("sql")["prod"] == three[1]
    registry.set_alias("sql", "prod", three[2])
    assert registry.aliases("sql")["prod"] == three[2]


def test_an_alias_keeps_its_history(registry, three):
    registry.set_alias("sql", "prod", three[0], reason="first release")
    registry.set_alias("sql", "prod", three[1], reason="better")
    registry.set_alias("sql", "prod", three[1], reason="no move at all")

    history = registry.history("sql", "prod")

    assert [(move.digest, move.previous, move.reason) for move in history] == [
        (three[0].digest, None, "first release"),
        (three[1].digest, three[0].digest, "better"),
    ]
    assert all(move.actor for move in history)
    assert history[0].moved_at <= history[1].moved_at
    assert [move.digest for move in registry.history("sql", "latest")] == [version.digest for version in three]


def test_an_alias_points_to_a_version_of_its_own_name(registry, three):
    with pytest.raises(UsageError, match=r"chat@v1 is no version of sql"):
        registry.set_alias("sql", "prod", registry.resolve("chat"))
    with pytest.raises(NameInvalid):
        registry.set_alias("sql", "v2", three[0])
    registry.remove("sql@v1")
    with pytest.raises(AdapterNotFound):
        registry.set_alias("sql", "prod", three[0])


# Listing


def test_a_listing_has_one_entry_per_name_in_order(registry, three):
    registry.set_alias("sql", "prod", three[0])

    chat, sql = registry.names()

    assert (chat.name, sql.name) == ("chat", "sql")
    assert sql.version == three[0]
    assert sql.aliases == {"latest": 3, "prod": 1}
    assert sql.num_versions == 3
    assert chat.version == registry.resolve("chat@v1")


def test_a_listing_shows_the_newest_version_where_no_alias_points(registry):
    registry.add(random_adapter(0), "sql", alias=None)
    newest = registry.add(random_adapter(1), "sql", alias=None)

    (entry,) = registry.names()
    assert (entry.version, entry.aliases) == (newest, {})


def test_a_listing_comes_in_pages_and_by_prefix(registry):
    registry.add_many((random_adapter(), name) for name in ("b", "a/x", "a/y", "ab", "A"))

    assert [entry.name for entry in registry.names()] == ["A", "a/x", "a/y", "ab", "b"]
    assert [entry.name for entry in registry.names(limit=2, after="A")] == ["a/x", "a/y"]
    assert [entry.name for entry in registry.names(after="a/y")] == ["ab", "b"]
    assert [entry.name for entry in registry.names(prefix="a/")] == ["a/x", "a/y"]
    assert [entry.name for entry in registry.names(prefix="%")] == []
