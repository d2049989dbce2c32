"""`flora extract --resume`: a process killed for real goes on; and several fine-tunes of which one is broken."""

import os
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from flora.extract import ExtractProgress
from tests.cli.models import make_tuned

KILLED_WHEN_STORING = """
import os, signal, sys
from flora.cli import main
from flora.registry import Registry

Registry.add = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # the work is done, and nothing is stored yet
main(sys.argv[1:])
"""
INTERRUPTED_WHEN_STORING = """
import os, signal, sys
from flora.cli import main
from flora.registry import Registry

signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it, and so would this
Registry.add = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)
sys.exit(main(sys.argv[1:]))
"""


def unfinished(home):
    folder = home / "cache" / "unfinished"
    return list(folder.iterdir()) if folder.exists() else []


def test_a_run_killed_before_its_adapter_was_stored_loses_nothing(flora, base, tuned, home, tmp_path):
    words = ["extract", base, tuned, "--rank", "8", "--name", "sql"]
    env = os.environ | {"FLORA_HOME": str(home), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", KILLED_WHEN_STORING, *map(str, words)], env=env, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert flora("ls", "-q").out == ""
    assert len(unfinished(home)) == 1

    done = flora(*words, "--resume", "--json").json["adapters"][0]

    assert done["num_resumed"] == len(done["tensors"]) == 20
    assert unfinished(home) == []
    afresh = flora(*words, "--registry", tmp_path / "other", "--json").json["adapters"][0]
    assert (afresh["num_resumed"], afresh["digest"]) == (0, done["digest"])


def test_who_interrupts_a_run_is_told_how_it_goes_on(flora, base, tuned, home):
    words = ["extract", base, tuned, "--rank", "8", "--name", "sql"]
    env = os.environ | {"FLORA_HOME": str(home), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, "-c", INTERRUPTED_WHEN_STORING, *map(str, words)]

    interrupted = subprocess.run(script, env=env, capture_output=True, text=True)

    assert interrupted.returncode == 130
    assert interrupted.stderr == (
        "20 tensors are done: the same command with --resume goes on from there\ninterrupted\n"
    )
    assert flora(*words, "--resume", "--json").json["adapters"][0]["num_resumed"] == 20


def test_before_the_first_tensor_there_is_nothing_to_go_on_with(flora, base, tuned, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("flora.extract.extract_many", interrupted)

    assert flora("extract", base, tuned, "--rank", 8, code=130).err == "interrupted\n"


def test_a_finished_run_leaves_nothing_to_resume(flora, base, tuned, home):
    flora("extract", base, tuned, "--rank", 4, "--name", "sql")

    assert unfinished(home) == []
    again = flora("extract", base, tuned, "--rank", 4, "--name", "sql", "--resume")
    assert "resumed" not in again.err


@pytest.mark.parametrize("form", ["--json", "-q"])
def test_one_broken_fine_tune_among_several_costs_only_itself(flora, base, tuned, tmp_path, form):
    bad = make_tuned(base, tmp_path / "bad", seed=8)
    tensors = load_file(bad / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] = float("nan")
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    other = make_tuned(base, tmp_path / "other", seed=9)

    done = flora("extract", base, tuned, bad, other, "--rank", 2, form, code=1)

    assert "FL-NOTFINITE" in done.err
    assert set(flora("ls", "-q").out.split()) == {"tiny-tuned", "other"}


def test_several_at_once_are_the_adapters_of_one_at_a_time(flora, base, tuned, tmp_path):
    other = make_tuned(base, tmp_path / "other", seed=9)
    at_once = flora("extract", base, tuned, other, "--rank", 2, "--json").json["adapters"]

    alone = [
        flora("extract", base, one, "--rank", 2, "--json", "--registry", tmp_path / "r").json["adapters"][0]
        for one in (tuned, other)
    ]

    assert [one["digest"] for one in at_once] == [one["digest"] for one in alone]


def test_who_interrupts_a_run_on_pickled_weights_is_told_nothing_of_going_on(flora, base, tuned, monkeypatch):
    """Its record is of copies that end with it."""

    def interrupted(base, tuned, config, tell, records):
        tell(ExtractProgress("a", 1, 2, 1, 2))
        raise KeyboardInterrupt

    monkeypatch.setattr("flora.extract.extract_many", interrupted)

    assert "--resume" in flora("extract", base, tuned, code=130).err
    assert flora("extract", base, tuned, "--allow-pickle", code=130).err == "interrupted\n"
