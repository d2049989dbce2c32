"""`flora verify`: what it prints, and how it ends."""

import json
import subprocess
import sys

import pytest

from tests.cli.models import make_base, make_tuned


def test_verify_agrees_with_the_record(stored, base, tuned):
    done = stored("verify", base, tuned, "sql", "--json")

    said = stored("show", "sql", "--json").json
    assert done.json["schema_version"] == 1
    assert done.json["holds"] is True
    assert done.json["ref"] == "sql@v1"
    assert done.json["kept_share"] == pytest.approx(said["kept_share"], abs=1e-5)
    assert len([row for row in done.json["tensors"] if row["rank"]]) == 14
    assert all(abs(row["kept_share"] - row["certified_share"]) < 1e-5 for row in done.json["tensors"])


def test_verify_is_a_table_too(stored, base, tuned):
    done = stored("verify", base, tuned, "sql")

    heading, *rows = done.rows
    assert heading == ["name", "rank", "kept_share", "certified_share", "holds"]
    assert {row[4] for row in rows} == {"true"}
    assert "sql@v1 keeps" in done.err


def test_a_folder_is_verified_without_a_registry(flora, base, tuned, home, tmp_path):
    flora("extract", base, tuned, "--rank", 2, "--out", tmp_path / "adapter")

    assert flora("verify", base, tuned, tmp_path / "adapter", "--json").json["holds"] is True
    assert not (home / "registry").exists()


def test_another_fine_tune_exits_3(stored, base, tmp_path):
    other = make_tuned(base, tmp_path / "other", seed=7)

    done = stored("verify", base, other, "sql", "--json", code=3)

    assert done.json["holds"] is False
    error = json.loads(done.err.splitlines()[-1])["error"]
    assert error["code"] == "FL-CHECK"
    assert "tiny-tuned" in error["fix"]


def test_a_record_that_was_changed_exits_3(flora, base, tuned, tmp_path):
    flora("extract", base, tuned, "--rank", 2, "--out", tmp_path / "adapter")
    record = json.loads((tmp_path / "adapter" / "flora.json").read_text())
    tensor = next(one for one in record["report"]["tensors"] if one["name"].endswith("0.mlp.up_proj.weight"))
    tensor["kept"] = tensor["norm_squared"]
    (tmp_path / "adapter" / "flora.json").write_text(json.dumps(record))

    done = flora("verify", base, tuned, tmp_path / "adapter", code=3)

    assert "1 of 20 tensors are not as" in done.err
    assert "model.layers.0.mlp.up_proj.weight: " in done.err
    assert "100.0 % is recorded" in done.err


def test_another_base_is_refused(stored, tuned, tmp_path):
    done = stored("verify", make_base(tmp_path / "other", seed=4), tuned, "sql", code=1)

    assert "error[FL-BASE]" in done.err


def test_prompts_compare_answers(stored, base, tuned, tmp_path):
    (tmp_path / "prompts.txt").write_text("copy:saberu=\nupper:ma=\n")

    done = stored("verify", base, tuned, "sql", "--prompts", tmp_path / "prompts.txt", "--json")

    likeness = done.json["likeness"]
    assert (likeness["num_prompts"], likeness["num_tokens"]) == (2, 23)
    assert 0 <= likeness["kl_tuned_adapter"] < likeness["kl_tuned_base"]
    assert len(likeness["prompts"]) == 2


def test_prompts_without_transformers_name_the_extra(stored, base, tuned, home, tmp_path):
    """In a process whose import of transformers fails as it does where the package is missing."""
    (tmp_path / "prompts.txt").write_text("copy:saberu=\n")
    words = ["verify", base, tuned, "sql", "--prompts", tmp_path / "prompts.txt"]
    script = (
        "import sys\n"
        "sys.modules['transformers'] = None\n"
        "from flora.cli import main\n"
        f"sys.exit(main({[str(word) for word in words]!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert done.returncode == 2
    assert "pip install 'flora-adapters[hf]'" in done.stderr


def test_prompts_that_are_none_are_refused_before_any_work(stored, base, tuned, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")

    assert "holds no prompt" in stored("verify", base, tuned, "sql", "--prompts", tmp_path / "empty.txt", code=2).err
    assert "FL-ERROR" in stored("verify", base, tuned, "sql", "--prompts", tmp_path / "none.txt", code=1).err


def test_a_damaged_folder_is_refused(flora, base, tuned, tmp_path):
    flora("extract", base, tuned, "--rank", 2, "--out", tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"\0" * 64)

    assert "error[FL-INVALID]" in flora("verify", base, tuned, tmp_path / "adapter", code=1).err
