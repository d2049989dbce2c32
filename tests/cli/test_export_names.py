"""Folders for PEFT have the names of the tree that loads them, which may be others than the checkpoint's."""

import json
from pathlib import Path

from tests.cli.conftest import Flora
from tests.extract.models import save, tune
from tests.extract.moe_judge import built

ROUTER = "model.layers.0.block_sparse_moe.router"


def routers(folder: Path) -> set[str]:
    targets = json.loads((folder / "adapter_config.json").read_text())["target_parameters"]
    return {name for name in targets if name.startswith(ROUTER)}


def test_an_export_goes_by_its_base_wherever_that_lies(flora: Flora, tmp_path):
    """Granite's checkpoints have `router.layer.weight`, transformers 5 loads it as `router.weight`."""
    model = built("granite")
    save(model, tmp_path / "base"), save(tune(model), tmp_path / "tuned")
    flora("extract", tmp_path / "base", tmp_path / "tuned", "--rank", 4, "--routers", "--name", "moe", "-q")

    flora("export", "moe", "--out", tmp_path / "known", "-q")
    (tmp_path / "share").mkdir()
    flora("push", "moe", tmp_path / "share" / "moe", "-q")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    flora("export", "moe", "--out", tmp_path / "unknown", "-q")
    flora("export", "moe", "--base", tmp_path / "elsewhere", "--out", tmp_path / "told", "-q")

    assert routers(tmp_path / "known") == routers(tmp_path / "told") == {f"{ROUTER}.weight"}
    assert routers(tmp_path / "share" / "moe") == {f"{ROUTER}.weight"}
    assert routers(tmp_path / "unknown") == {f"{ROUTER}.layer.weight"}
    for number, folder in enumerate(("known", "unknown", "told")):
        flora("import", tmp_path / folder, "--name", f"again-{number}")
        again = flora("show", f"again-{number}", "--json").json
        assert again["serving_digest"] == flora("show", "moe", "--json").json["serving_digest"]
