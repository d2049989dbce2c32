"""Promotion under conditions, protection, labels, search, lineage, events and completion, through the command line."""

import json
import os
import subprocess
import sys

import pytest


def test_a_promotion_wants_what_is_required(stored):
    refused = stored("promote", "sql", "--require", "energy>=1.01", "--require", "rank<=1", code=3)
    assert "sql@v1 is not promoted to prod: it does not meet energy>=1.01" in refused.err
    assert "rank<=1" in refused.err

    stored("promote", "sql", "--require", "energy>=0.1", "--require", "base=proven", "--reason", "good")

    assert stored("show", "sql", "--json").json["aliases"] == {"latest": 1, "prod": 1}


def test_a_promotion_can_go_to_another_alias_and_be_tried_first(stored):
    stored("promote", "sql", "--to", "canary", "--dry-run")
    assert "canary" not in stored("show", "sql", "--json").json["aliases"]

    assert stored("promote", "sql", "--to", "canary", "-q").out == "sql:canary\n"


def test_a_protected_alias_moves_by_force_alone(stored):
    stored("prune", "sql", "--rank", 1)
    stored("promote", "sql@v1")
    stored("registry", "protect", "sql", "prod")

    assert "protected" in stored("promote", "sql@v2", code=2).err
    stored("promote", "sql@v2", "--force", "--reason", "now")
    assert stored("show", "sql", "--json").json["protected"] == ["prod"]
    assert "protected" in stored("rollback", "sql", code=2).err
    stored("registry", "unprotect", "sql", "prod")
    assert stored("rollback", "sql", "--json").json["ref"] == "sql@v1"


def test_labels_are_shown_and_searched(stored):
    stored("label", "sql", "team=data", "task=text-to-sql")
    stored("label", "sql", "task=")

    assert stored("show", "sql", "--json").json["labels"] == {"team": "data"}
    assert stored("search", "--label", "team=data", "-q").out == "sql@v1\n"
    assert stored("search", "DATA", "--json").json["versions"][0]["labels"] == {"team": "data"}
    assert stored("search", "--label", "task", "-q").out == ""
    assert stored("search", "--min-energy", "0.01", "--max-rank", 8, "--made-by", "extract", "-q").out == "sql@v1\n"


def test_lineage_goes_back_to_the_checkpoints(stored):
    stored("prune", "sql", "--rank", 1)

    rows = stored("show", "sql@v2", "--lineage", "--json").json["lineage"]

    assert [(row["depth"], row["operation"], row["ref"]) for row in rows] == [
        (0, "prune", "sql@v2"),
        (1, "extract", "sql@v1"),
    ]
    assert rows[1]["tuned"] == "tiny-tuned"
    assert rows[1]["base_id"].startswith("sha256:")


def test_events_are_listed_from_a_cursor_and_followed(stored, home):
    first = stored("registry", "events", "--json").json["events"]
    assert [event["op"] for event in first] == ["add", "alias"]
    cursor = first[-1]["cursor"]
    command = [sys.executable, "-m", "flora", "registry", "events", "--follow", "--after", str(cursor)]
    follower = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        assert follower.stdout is not None
        assert follower.stdout.readline().startswith("cursor\t")  # it is listening

        stored("tag", "sql@v1", "canary")

        lines = [follower.stdout.readline() for _ in range(2)]
        assert "\talias\tsql\t:canary -> sha256:" in lines[-1]
    finally:
        follower.terminate()
        follower.wait()


@pytest.mark.parametrize(
    ("typed", "offered"), [("s", ["sql"]), ("x", []), ("sql:", ["sql:latest"]), ("sql@", ["sql@v1"]), ("nobody:", [])]
)
def test_a_shell_completes_references(stored, typed, offered):
    env = os.environ | {"_FLORA_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": f"flora show {typed}"}
    script = "from flora.cli.app import make_app; make_app()(prog_name='flora')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)

    assert [each for each in ("sql:latest", "sql@v1", "sql") if f'"{each}"' in done.stdout.replace("\\", "")] == offered


def test_every_answer_in_json_has_a_schema_version(stored):
    for words in (["ls"], ["show", "sql"], ["search"], ["label", "sql"], ["registry", "events"], ["gc"], ["fsck"]):
        assert json.loads(stored(*words, "--json").out)["schema_version"] == 1
