"""The JSON that docs/json promises is the JSON that commands print: every key, and no other.

Beside these, every answer in JSON that a test of this folder asks for is held against its schema (`conftest.flora`).
"""

import json
import shutil

import pytest
from jsonschema import Draft202012Validator, ValidationError

from flora.cli.app import make_app
from tests.cli.schemas import SHARED, by_command, check_answer, check_error, schemas

COMMANDS = {command.name or "": command for command in make_app().registered_commands} | {
    f"{group.name} {command.name}": command
    for group in make_app().registered_groups
    if group.typer_instance
    for command in group.typer_instance.registered_commands
}
ELSEWHERE = {  # the tests that ask for them
    "run": "test_serving.py",
    "ps": "test_serving.py",
    "load": "test_serving.py",
    "unload": "test_serving.py",
    "demo": "test_demo.py",
}
ANSWERS = [
    ["extract", "{base}", "{tuned}", "--rank", "2", "--name", "two", "--out", "{tmp}/two"],
    ["extract", "{base}", "{tuned}", "--rank", "2", "--dry-run"],
    ["prune", "sql", "--rank", "2"],
    ["prune", "sql", "--rank", "2", "--dry-run"],
    ["prune", "sql", "--rank", "8"],
    ["inspect", "sql"],
    ["inspect", "sql", "--spectra"],
    ["verify", "{base}", "{tuned}", "sql"],
    ["merge", "{base}", "sql", "--name", "merged", "--out", "{tmp}/merged"],
    ["merge", "{base}", "sql", "--out", "{tmp}/merged"],
    ["diff", "sql", "sql"],
    ["ls"],
    ["show", "sql"],
    ["show", "sql", "--lineage"],
    ["search", "sql"],
    ["label", "sql", "a=b"],
    ["tag", "sql", "canary"],
    ["promote", "sql"],
    ["promote", "sql", "--dry-run"],
    ["rm", "sql"],
    ["gc"],
    ["fsck"],
    ["import", "{tmp}/sql", "--name", "again"],
    ["export", "sql", "--out", "{tmp}/out"],
    ["compat", "sql"],
    ["push", "sql", "ann/sql", "--dry-run"],
    ["push", "sql", "{tmp}/shared/sql"],
    ["pull", "{tmp}/sql"],
    ["pull", "--all", "{tmp}"],
    ["doctor"],
    ["registry", "protect", "sql", "prod"],
    ["registry", "unprotect", "sql", "prod"],
    ["registry", "events"],
    ["registry", "reindex"],
    ["registry", "conformance", "{tmp}/registry"],
]


@pytest.mark.parametrize("words", ANSWERS, ids=" ".join)
def test_answers_are_as_their_schema_says(stored, base, tuned, tmp_path, words):
    stored("export", "sql", "--out", tmp_path / "sql", "-q")

    answer = stored(*(word.format(base=base, tuned=tuned, tmp=tmp_path) for word in words), "--json").json

    check_answer(words, answer, closed=True)
    told = next(value for key, value in answer.items() if key != "schema_version")
    assert told != [] or words == ["fsck"]


def test_a_rollback_answers_as_a_promotion_does(stored):
    stored("promote", "sql", "-q")
    stored("prune", "sql", "--rank", "2", "-q")
    stored("promote", "sql@v2", "-q")

    check_answer(["rollback"], stored("rollback", "sql", "--json").json, closed=True)


def test_what_is_claimed_of_the_server_answers_as_its_schemas_say(flora, tmp_path):
    row = {"label": "table/0", "req_s": 40.0, "gpu": None, "commit": "abc"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")

    plan = flora("bench", "suite", "--list", "--small", "--json").json
    claims = flora("bench", "claims", tmp_path / "rows.jsonl", "--json").json

    check_answer(["bench", "suite", "--list"], plan, closed=True)
    check_answer(["bench", "claims"], claims, closed=True)
    assert plan["entries"]
    assert claims["claims"]


def test_an_unchanged_checkpoint_is_told_of(flora, base, tmp_path):
    shutil.copytree(base, tmp_path / "copy")
    answer = flora("extract", base, tmp_path / "copy", "--json").json

    check_answer(["extract"], answer, closed=True)
    assert answer["unchanged"]


@pytest.mark.parametrize(
    "words", [["show", "nobody"], ["ls", "--quiet"], ["no-such-verb"], ["extract", "/no", "/such"]]
)
def test_an_error_is_as_its_schema_says(stored, words):
    done = stored(*words, "--json", code=None)

    assert done.code != 0
    check_error(json.loads(done.err.splitlines()[-1]))


def test_every_verb_that_answers_in_json_has_a_schema_and_a_test():
    """But for `flora bench`, whose rows have fields by what was measured: `tests/bench`."""
    answering = {
        verb
        for verb, command in COMMANDS.items()
        if "as_json" in command.callback.__annotations__ and not verb.startswith("bench ")
    }
    asked = {verb for verb in COMMANDS for words in ANSWERS if words[: len(verb.split())] == verb.split()}

    described = {" ".join(word for word in command.split() if not word.startswith("-")) for command in by_command()}

    assert len(answering) > 30
    assert answering == {verb for verb in described if not verb.startswith("bench ")}
    assert answering == asked | set(ELSEWHERE) | {"rollback"}


@pytest.mark.parametrize("name", schemas())
def test_a_schema_is_one_and_explains_itself(name):
    schema = schemas()[name]

    Draft202012Validator.check_schema(schema)
    assert schema["$id"] == name
    assert name == SHARED or schema["description"]


def test_an_answer_with_a_missing_key_or_a_wrong_type_is_caught(stored):
    answer = stored("ls", "--json").json
    del answer["adapters"][0]["digest"]
    with pytest.raises(ValidationError, match="'digest' is a required property"):
        check_answer(["ls"], answer)

    answer = stored("label", "sql", "--json").json | {"labels": {"a": 1}}
    with pytest.raises(ValidationError, match="1 is not of type 'string'"):
        check_answer(["label"], answer)
    with pytest.raises(ValidationError, match="Unevaluated properties"):
        check_answer(["label"], stored("label", "sql", "--json").json | {"more": 1}, closed=True)
