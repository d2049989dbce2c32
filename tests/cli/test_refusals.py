"""Bad input at the command line: a message that says what to do, an exit code, and nothing half-written."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flora.cli import main
from tests.cli.models import make_base, make_tuned, rename_base


def copy(folder, to):
    shutil.copytree(folder, to)
    return to


def rewrite(folder, change):
    """Changes the tensors of a checkpoint's one file."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def without_weights(tuned, folder):
    copy(tuned, folder)
    (folder / "model.safetensors").unlink()
    return folder


def truncated(tuned, folder):
    copy(tuned, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return folder


def pickled(tuned, folder):
    without_weights(tuned, folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04 would run code if anyone opened it")
    return folder


def with_another_shape(tuned, folder):
    def narrow(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:-1].contiguous()

    return rewrite(copy(tuned, folder), narrow)


def with_nan(tuned, folder):
    def spoil(tensors):
        tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] = float("nan")

    return rewrite(copy(tuned, folder), spoil)


def with_inf(tuned, folder):
    def spoil(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("inf")

    return rewrite(copy(tuned, folder), spoil)


BAD_CHECKPOINTS = {
    without_weights: "FL-CHECKPOINT",
    truncated: "FL-CHECKPOINT",
    pickled: "FL-PICKLE",
    with_another_shape: "FL-SHAPE",
    with_nan: "FL-NOTFINITE",
    with_inf: "FL-NOTFINITE",
}


@pytest.mark.parametrize("spoil", BAD_CHECKPOINTS, ids=lambda spoil: spoil.__name__)
def test_a_bad_checkpoint_is_refused_and_leaves_nothing_behind(spoil, flora, base, tuned, home, tmp_path):
    bad = spoil(tuned, tmp_path / "bad")

    done = flora("extract", base, bad, "--rank", 4, "--name", "bad", "--out", tmp_path / "out", code=1)

    assert f"error[{BAD_CHECKPOINTS[spoil]}]" in done.err
    assert "fix: " in done.err
    assert done.out == ""
    assert not (tmp_path / "out").exists()
    assert flora("ls", "--json").json["adapters"] == []


BAD_WORDS = [  # words of the command line, exit code, error code
    (["extract", "{base}", "{tuned}", "--rank", "0"], 2, "FL-USAGE"),
    (["extract", "{base}", "{tuned}", "--energy", "1.5"], 2, "FL-USAGE"),
    (["extract", "{base}", "{tuned}", "--budget", "many"], 2, "FL-USAGE"),
    (["extract", "{base}", "{tuned}", "--dtype", "int8"], 2, "FL-USAGE"),
    (["extract", "{base}", "{tuned}", "--name", "../x"], 2, "FL-NAME"),
    (["extract", "{base}", "{tuned}", "--name", "sql:prod"], 2, "FL-NAME"),
    (["extract", "{base}", "{base}"], 2, "FL-USAGE"),
    (["extract", "{base}", "{tuned}", "--include", "nothing.like.this"], 2, "FL-USAGE"),
    (["extract", "{base}", "{tuned}", "--out", "{base}"], 2, "FL-USAGE"),
    (["extract", "{base}", "{tuned}", "{tuned}", "--name", "two"], 2, "FL-USAGE"),
    (["prune", "sql", "--rank", "two"], 2, "FL-USAGE"),
    (["extract", "{base}", "{tuned}", "--device", "abacus"], 2, "FL-USAGE"),
    (["extract", "{base}", "{tuned}", "--energy", "0.999999", "--rank", "1", "--strict"], 3, "FL-CHECK"),
    (["extract", "{base}", "/no/such/folder"], 5, "FL-NOTFOUND"),
    (["extract", "{base}"], 2, "FL-USAGE"),
    (["extract", "{base}", "{tuned}", "--no-such-flag"], 2, "FL-USAGE"),
    (["no-such-verb"], 2, "FL-USAGE"),
    (["show", "nobody"], 5, "FL-ADAPTER"),
    (["show", "../x"], 2, "FL-NAME"),
    (["show", "sql@v7"], 5, "FL-ADAPTER"),
    (["prune", "sql"], 2, "FL-USAGE"),
    (["prune", "sql", "--rank", "2", "--alias", "v1"], 2, "FL-NAME"),
    (["prune", "nobody", "--rank", "2"], 5, "FL-ADAPTER"),
    (["tag", "sql@v1", "v3"], 2, "FL-NAME"),
    (["rollback", "sql"], 5, "FL-NOTFOUND"),
    (["rollback", "nobody"], 5, "FL-ADAPTER"),
    (["rm", "sql:latest"], 2, "FL-USAGE"),
    (["import", "/no/such/folder", "--name", "x"], 5, "FL-NOTFOUND"),
    (["import", "{base}", "--name", "x"], 1, "FL-INVALID"),
    (["export", "sql", "--out", "{base}"], 2, "FL-USAGE"),
    (["push", "sql", "not a hub id", "--dry-run"], 2, "FL-USAGE"),
    (["ls", "--registry", "/no/such/registry"], 5, "FL-NOTFOUND"),
    (["ls", "--registry", "mysql://somewhere"], 2, "FL-USAGE"),
    (["serve", "/no/such/folder"], 5, "FL-NOTFOUND"),
    (["serve", "{base}", "--host", "0.0.0.0"], 2, "FL-USAGE"),
    (["serve", "{base}", "--pool", "much"], 2, "FL-USAGE"),
    (["serve", "{base}", "--max-len", "far"], 2, "FL-USAGE"),
    (["serve", "{base}", "--dtype", "int8"], 2, "FL-USAGE"),
    (["serve", "{base}", "--adapter-dtype", "int4"], 2, "FL-USAGE"),
    (["serve", "{base}", "--adapter-dtype", "float8", "--dtype", "float16"], 2, "FL-USAGE"),
    (["serve", "{base}", "--device", "abacus"], 2, "FL-USAGE"),
    (["serve", "{base}", "--device", "cuda:99"], 2, "FL-USAGE"),
    (["serve", "{base}", "--api-key-file", "/no/such/file"], 2, "FL-USAGE"),
    (["run", "sql", "Hello", "--server", "http://127.0.0.1:9"], 1, "FL-REMOTE"),
    (["demo", "--out", "{base}"], 2, "FL-USAGE"),
]


@pytest.mark.parametrize(("words", "code", "error"), BAD_WORDS, ids=[" ".join(words) for words, _, _ in BAD_WORDS])
def test_a_bad_command_line_is_refused_with_its_exit_code(words, code, error, stored, base, tuned):
    before = stored("show", "sql", "--json").out
    words = [word.format(base=base, tuned=tuned) for word in words]

    done = stored(*words, code=code)

    assert f"error[{error}]: " in done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    assert stored("ls", "-q").out.split() == ["sql"]
    assert stored("show", "sql", "--json").out == before


def test_with_json_an_error_is_a_json_object_on_stderr(stored):
    assert json.loads(stored("ls", "--json", "--quiet", code=2).err)["error"]["code"] == "FL-USAGE"
    error = json.loads(stored("show", "nobody", "--json", code=5).err)

    assert error["schema_version"] == 1
    assert error["error"]["code"] == "FL-ADAPTER"
    assert error["error"]["what"]


def test_a_near_miss_of_a_name_is_pointed_out(stored):
    assert "sql" in stored("show", "sq", code=5).err.partition("fix: ")[2]


def test_a_name_that_belongs_to_another_base_is_refused_before_the_work(stored, tmp_path):
    other = make_base(tmp_path / "other-base", seed=5)
    tuned = make_tuned(other, tmp_path / "sql")

    done = stored("extract", other, tuned, "--rank", 2, code=2)  # the folder's name is taken

    assert "belongs to" in done.err
    assert "--name" in done.err


def test_a_wrong_base_with_the_same_shapes_is_another_base(stored, tuned, tmp_path):
    other = make_base(tmp_path / "other-base", seed=5)
    stored("extract", other, tuned, "--rank", 2, "--name", "from-other")

    done = stored("serve", code=2)

    assert "2 bases" in done.err
    assert "tiny-base" in done.err
    assert "other-base" in done.err


def test_serve_without_adapters_asks_for_a_base(flora):
    assert "flora serve BASE" in flora("serve", code=2).err


def test_serve_says_so_when_the_base_is_gone(stored, tuned, tmp_path):
    moved = make_base(tmp_path / "moved-base")
    stored("extract", moved, tuned, "--rank", 2, "--name", "sql")
    stored("rm", "sql")
    stored("extract", moved, make_tuned(moved, tmp_path / "t2"), "--rank", 2, "--name", "of-moved")
    shutil.rmtree(moved)

    done = stored("serve", code=5)

    assert "is gone" in done.err


def test_an_offline_hub_id_is_a_clear_error(flora, tuned, monkeypatch):
    done = subprocess.run(
        [sys.executable, "-m", "flora", "extract", "nobody/no-such-model", str(tuned)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )

    assert done.returncode == 1
    assert "error[FL-REMOTE]" in done.stderr
    assert "give a local folder" in done.stderr


def test_a_hub_id_in_the_config_is_what_the_base_is_called(flora, base, tuned, tmp_path):
    named = copy(base, tmp_path / "anything")
    rename_base(named, "someone/tiny-base")

    flora("extract", named, tuned, "--rank", 2, "--name", "sql")

    assert flora("show", "sql", "--json").json["base"] == "someone/tiny-base"


def test_a_traceback_is_shown_only_when_it_is_asked_for(flora, monkeypatch):
    assert "Traceback" not in flora("show", "nobody", code=5).err

    monkeypatch.setenv("FLORA_DEBUG", "1")

    assert "Traceback" in flora("show", "nobody", code=5).err


def test_a_full_disk_is_told_in_words_and_leaves_no_version(stored, base, tuned, tmp_path):
    script = (
        "import resource, signal, sys\n"
        "from flora.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"  # writes past the limit then fail as on a full disk
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = ["extract", base, tuned, "--rank", "16", "--out", tmp_path / "out"]

    done = subprocess.run([sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True)

    assert done.returncode == 1
    assert "error[FL-STORE]" in done.stderr
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_only_devices_that_are_there_are_proposed(flora, base, tuned):
    found = ["cpu", *(f"cuda:{ordinal}" for ordinal in range(torch.cuda.device_count()))]

    done = flora("extract", base, tuned, "--rank", 2, "--device", "cuda:99", code=2)

    assert f"fix: give {' or '.join(found)}\n" in done.err


def test_a_gpu_that_pytorch_does_not_find_is_no_bug_of_the_engine(home, base):
    """With a pool's size nobody asks the driver before the engine does."""
    words = ["serve", str(base), "--device", "cuda:99", "--pool", "32MiB", "--host-cache", "16MiB", "--port", "0"]

    done = subprocess.run([sys.executable, "-m", "flora", *words], capture_output=True, text=True, timeout=120)

    assert done.returncode == 2
    assert "error[FL-USAGE]: there is no GPU cuda:99 to serve on" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_ends_with_130(home):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, "-m", "flora", "run", "sql", "Hello", "--server", url],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # a test run that a script started in the background ignores the signal, and its children inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        connection, _ = listener.accept()  # it waits for an answer that never comes
        with connection:
            assert connection.recv(1)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert (out, err) == ("", "interrupted\n")


def test_a_reader_that_goes_away_is_no_error(stored):
    process = subprocess.Popen(
        [sys.executable, "-m", "flora", "show", "sql", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()

    assert process.wait(60) in (0, 1)
    assert b"Traceback" not in errors


def test_two_extractions_at_once_both_land(home, base, tuned):
    command = [sys.executable, "-m", "flora", "extract", str(base), str(tuned), "--rank"]
    processes = [subprocess.Popen([*command, rank, "--name", "sql", "-q"]) for rank in ("2", "3")]

    assert [process.wait(120) for process in processes] == [0, 0]
    assert main(["show", "sql@v2"]) == 0


def test_a_checkpoint_in_another_dtype_is_no_obstacle(flora, base, tuned, tmp_path):
    def widen(tensors):
        for name in tensors:
            tensors[name] = tensors[name].to(torch.float32)

    wide = rewrite(copy(tuned, tmp_path / "wide"), widen)

    flora("extract", base, tuned, "--rank", 4, "--name", "narrow")
    flora("extract", base, wide, "--rank", 4, "--name", "wide")

    digests = {flora("show", name, "--json").json["serving_digest"] for name in ("narrow", "wide")}
    assert len(digests) == 1


def test_paths_of_this_machine_stay_out_of_an_adapter(flora, base, tuned, tmp_path):
    flora("extract", base, tuned, "--rank", 2, "--out", tmp_path / "out")

    for file in (tmp_path / "out").iterdir():
        assert str(Path(base).parent).encode() not in file.read_bytes()
