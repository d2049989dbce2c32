"""`flora push` and `pull` through the command line, with folders as remotes."""

import json
import shutil
import subprocess
import sys

import pytest

from flora.registry import Registry


def test_a_pushed_folder_is_pulled_as_the_same_version(stored, tmp_path):
    pushed = stored("show", "sql", "--json").json

    stored("push", "sql", tmp_path / "share" / "sql-v1", "-q")
    pulled = stored("pull", tmp_path / "share" / "sql-v1", "--name", "again", "--json").json

    assert pulled["digest"] == pushed["digest"]
    assert pulled["made_by_flora"]
    assert stored("show", "again", "--json").json["provenance"]["remote"] == str(tmp_path / "share" / "sql-v1")


def test_the_name_is_the_last_part_of_the_address(stored, tmp_path):
    stored("push", "sql", tmp_path / "sql-lora", "-q")

    assert stored("pull", tmp_path / "sql-lora", "-q").out == "sql-lora@v1\n"


def test_an_import_by_pull_says_that_its_base_is_only_claimed(stored, tmp_path):
    stored("export", "sql", "--out", tmp_path / "theirs", "-q")
    (tmp_path / "theirs" / "flora.json").unlink()

    pulled = stored("pull", tmp_path / "theirs", "--json").json

    assert not pulled["made_by_flora"]
    assert not pulled["base_is_proven"]


def test_a_base_that_is_given_is_proven(stored, base, tmp_path):
    stored("export", "sql", "--out", tmp_path / "theirs", "-q")
    (tmp_path / "theirs" / "flora.json").unlink()

    assert stored("pull", tmp_path / "theirs", "--base", base, "--json").json["base_is_proven"]


def test_the_base_of_a_folder_that_flora_made_is_proven_by_the_registry_and_not_by_the_folder(stored, base, tmp_path):
    """Its author can write any id there, and sign that."""
    stored("export", "sql", "--out", tmp_path / "ours", "-q")
    elsewhere = ["--registry", tmp_path / "elsewhere"]

    pulled = stored("pull", tmp_path / "ours", "--name", "sql", "--json", *elsewhere).json

    assert pulled["made_by_flora"]
    assert pulled["base_id"] is not None
    assert not pulled["base_is_proven"]
    refused = stored("promote", "sql", "--require", "base=proven", *elsewhere, code=3)
    assert "its base is only claimed, as sha256:" in refused.err
    assert "--base" in refused.err

    again = stored("pull", tmp_path / "ours", "--name", "sql", "--base", base, "--json", *elsewhere).json

    assert again["base_is_proven"]
    assert again["digest"] == pulled["digest"]
    stored("promote", "sql", "--require", "base=proven", *elsewhere)


def test_a_folder_of_adapters_is_pulled_whole_and_what_is_refused_is_told(stored, tmp_path):
    source = tmp_path / "loras"
    for name in ("a", "b", "dora"):
        stored("export", "sql", "--out", source / name, "-q")
    (source / "dora" / "flora.json").unlink()
    config = source / "dora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))

    done = stored("pull", "--all", source, code=1)

    assert [row[0] for row in done.rows[1:]] == ["a@v1", "b@v1"]
    assert "dora: error[FL-UNSUPPORTED]" in done.err
    assert "1 of 3" in done.err


def test_a_watched_folder_brings_new_and_changed_adapters(stored, home, tmp_path):
    source = tmp_path / "loras"
    stored("export", "sql", "--out", source / "first", "-q")
    command = [sys.executable, "-m", "flora", "pull", "--all", "--watch", "0.1", str(source), "-q"]
    watcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "first@v1\n"

        shutil.copytree(source / "first", tmp_path / "second")
        (tmp_path / "second").rename(source / "second")

        assert watcher.stdout.readline() == "second@v1\n"
    finally:
        watcher.terminate()
        watcher.wait()
    with Registry.open(home / "registry") as registry:
        assert [entry.name for entry in registry.names()] == ["first", "second", "sql"]


def test_watching_without_all_is_a_usage_error(flora, tmp_path):
    assert "--watch wants --all" in flora("pull", tmp_path, "--watch", 1, code=2).err


def test_a_name_that_is_none_is_refused_before_anything_is_fetched(flora, tmp_path):
    assert "FL-NAME" in flora("pull", "https://huggingface.co/a/b", "--name", "a/b/c", code=2).err


@pytest.mark.parametrize(
    ("form", "files"),
    [
        ("mlx", ["adapter_config.json", "adapters.safetensors"]),
        ("gguf", ["adapter.gguf"]),
        ("kohya", ["lora.safetensors"]),
        ("diffusers", ["pytorch_lora_weights.safetensors"]),
        ("nim", ["sql"]),
    ],
)
def test_every_format_is_written_to_a_new_folder(stored, base, tmp_path, form, files):
    words = ["--base", base] if form == "gguf" else []

    stored("export", "sql", "--format", form, "--out", tmp_path / "out", *words)

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files


def test_gguf_wants_the_base(stored, tmp_path):
    assert "--base" in stored("export", "sql", "--format", "gguf", "--out", tmp_path / "out", code=2).err


def test_compat_names_every_engine_with_a_reason(stored):
    rows = stored("compat", "sql", "--json").json["engines"]

    assert {"PEFT", "vLLM", "SGLang", "LoRAX", "llama.cpp", "Ollama", "MLX-LM"} <= {row["engine"] for row in rows}
    assert all(row["reason"] and row["remedy"] and row["answer"] in ("yes", "portable", "no") for row in rows)
