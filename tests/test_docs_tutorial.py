"""`examples/tutorial.sh` as it stands: base, tuned, adapter, Hub, another registry, server."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.cli.models import make_base, make_tuned
from tests.registry.hub_server import TOKEN, serve_hub
from tests.serving import free_port

SCRIPT = Path(__file__).parents[1] / "examples" / "tutorial.sh"


def test_the_tutorial_goes_from_a_pair_through_the_hub_to_answers(tmp_path):
    base = make_base(tmp_path / "base")
    tuned = make_tuned(base, tmp_path / "tuned")
    with serve_hub() as hub:
        env = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "ADDRESS": "ann/caesar",
            "HF_ENDPOINT": hub.address,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "PORT": str(free_port()),
            "PROMPT": "copy:abc=",
        }
        env.pop("FLORA_REGISTRY_URL", None)
        done = subprocess.run(
            ["bash", SCRIPT, base, tuned], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stdout + done.stderr
        pushed = hub.repos["ann/caesar"]

    parts = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", done.stdout, re.MULTILINE | re.DOTALL))
    assert "adapter_model.safetensors" in pushed.files
    published, arrived = (
        re.search(r"^digest\t(\S+)", parts[step], re.MULTILINE)
        for step in (
            "extract the fine-tune's change as an adapter",
            "take it into another registry, as on another machine",
        )
    )
    assert published
    assert arrived
    assert published[1] == arrived[1]
    assert len(parts["ask the base, then the adapter"].splitlines()) >= 2
    deployed = parts["make a smaller version; the server follows without a restart"]
    moves = re.findall(r"^ref\t(\S+)", deployed, re.MULTILINE)
    assert moves == ["caesar@v1", "caesar@v2", "caesar@v2", "caesar@v1"]  # promoted, pruned, promoted, rolled back
