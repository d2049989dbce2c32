"""`flora diff`: what it prints."""

import pytest

from tests.cli.models import make_tuned


def test_diff_of_a_pruned_version_is_what_pruning_lost(stored):
    stored("prune", "sql", "--rank", 3)

    found = stored("diff", "sql@v1", "sql@v2", "--json").json

    rows = {row["module"]: row for row in found["modules"]}
    up = rows["model.layers.0.mlp.up_proj"]
    assert (up["left_rank"], up["right_rank"]) == (8, 3)
    assert 0 < up["distance"] < 0.7
    assert up["cosine"] == pytest.approx((1 - up["distance"] ** 2) ** 0.5, abs=1e-3)
    assert max(up["output_angles"]) < 0.2  # degrees: what is left points where it did, within the rounding of bf16
    assert found["distance"] < 1


def test_diff_of_two_fine_tunes(stored, base, tmp_path):
    stored("extract", base, make_tuned(base, tmp_path / "chat", seed=5), "--rank", 6, "--name", "chat")

    done = stored("diff", "sql", "chat")

    assert done.rows[0][:5] == ["module", "left_rank", "right_rank", "distance", "cosine"]
    assert len(done.rows) == 15
    assert "sql@v1 and chat@v1: distance 1." in done.err


def test_diff_of_a_folder_and_a_name(stored, tmp_path):
    stored("export", "sql", "--out", tmp_path / "sql")

    found = stored("diff", tmp_path / "sql", "sql", "--json").json

    assert found["distance"] < 1e-9
    assert found["notes"] == ["both have the same serving digest: they answer alike"]


def test_diff_with_a_name_that_is_not_there(stored):
    assert "error[FL-ADAPTER]" in stored("diff", "sql", "nobody", code=5).err
