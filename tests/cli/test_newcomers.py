"""What someone does in a first hour with Flora, and is told: mistakes that lead somewhere, and what is next."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flora.cli.commands.extract import _places
from flora.cli.extraction import Target
from flora.cli.remote import _refusal
from flora.errors import AdapterNotFound, ServeError
from flora.nearby import spelled_alike, with_weights_inside


@pytest.fixture
def workplace(base, tuned):
    """`BASE`, `TUNED` and a trainer's `run` in the working folder, which is empty but for them."""
    shutil.copytree(base, "BASE")
    shutil.copytree(tuned, "TUNED")
    shutil.copytree(tuned, "run/checkpoint-500")


MISTAKES = [  # words, exit code, what the fix has to name
    (["extract", "BASE", "./TUNDE"], 5, "did you mean TUNED?"),
    (["extract", "./base", "TUNED"], 5, "did you mean BASE?"),
    (["extract", "BASE", "TUNED/model.safetensors"], 5, "give the folder that it lies in: TUNED"),
    (["extract", "BASE", "run"], 1, "give the folder that does: run/checkpoint-500"),
    (["extract", "BASE", "TUNED", "--rank", "0"], 2, "1 or more"),
    (["rollback", "sql"], 5, "flora tag sql@vN prod"),
    (["show", "sqll"], 5, "sql"),
    (["label", "sql", "good"], 2, "good=VALUE"),
    (["run", "sql", "Hello", "--server", "http://127.0.0.1:9"], 1, "flora serve"),
]


@pytest.mark.parametrize(("words", "code", "told"), MISTAKES, ids=[" ".join(words) for words, _, _ in MISTAKES])
def test_a_mistake_is_answered_with_what_was_meant(words, code, told, stored, workplace):
    done = stored(*words, code=code)

    assert told in done.err.partition("fix: ")[2]


def test_an_adapter_larger_than_its_checkpoint_is_pointed_out(flora, base, tuned):
    assert "more bytes than the checkpoint" in flora("extract", base, tuned, "--rank", 64, "--name", "big").err
    assert "more bytes" not in flora("extract", base, tuned, "--rank", 4, "--name", "small").err


def test_a_plan_says_where_the_adapter_would_go():
    assert list(_places(Target("TUNED", "sql", Path("out")))) == ["the registry, as sql", "the folder out"]


def test_pushing_with_a_base_that_no_reader_will_find_is_pointed_out(stored):
    assert "tiny-base, which is no Hub id" in stored("push", "sql", "ann/sql", "--dry-run").err


def test_what_a_server_refuses_keeps_its_three_parts():
    message = b'{"error": {"message": "no adapter is named sqll. Cause: it is not here. Fix: did you mean sql?"}}'

    error = _refusal(404, message)

    assert isinstance(error, AdapterNotFound)
    assert (error.what, error.cause, error.fix) == ("no adapter is named sqll", "it is not here", "did you mean sql?")
    assert isinstance(_refusal(503, b"busy"), ServeError)
    assert _refusal(503, b"busy").fix


def test_a_pruning_that_was_only_tried_says_so(stored):
    assert "nothing was made" in stored("prune", "sql", "--rank", 2, "--dry-run").err
    assert "nothing was made" not in stored("prune", "sql", "--rank", 2).err


@pytest.mark.parametrize(
    ("shell", "typed", "offered"),
    [
        ("bash", {"COMP_WORDS": "flora merge ./base sq", "COMP_CWORD": "3"}, "sql"),
        (
            "fish",
            {"_TYPER_COMPLETE_ARGS": "flora serve --preload sql,s", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
            "sql,sql",
        ),
    ],
)
def test_the_command_itself_completes_adapters_in_a_shell(stored, shell, typed, offered):
    env = os.environ | {"_FLORA_COMPLETE": f"complete_{shell}"} | typed
    done = subprocess.run([sys.executable, "-m", "flora"], capture_output=True, text=True, env=env)

    assert (done.returncode, done.stdout.split()) == (0, [offered])


def test_folders_that_are_near_are_found_and_none_is_made_up(tmp_path):
    (tmp_path / "Llama-3-8B").mkdir()
    for name in ("checkpoint-10", "checkpoint-9"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "model.safetensors").write_bytes(b"")

    assert spelled_alike(tmp_path / "llama-3-8b") == tmp_path / "Llama-3-8B"
    assert spelled_alike(tmp_path / "qwen") is None
    assert spelled_alike(tmp_path / "nowhere" / "llama") is None
    assert with_weights_inside(tmp_path / "run") in (tmp_path / "run").iterdir()
    assert with_weights_inside(tmp_path) is None
