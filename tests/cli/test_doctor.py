"""`flora doctor` on machines where something is not well: what it says, and what to do about it."""

import re
import shutil
import socket
import sys
from pathlib import Path

import pytest

from flora.cli import health
from flora.cli.machine import Gpu
from flora.config import Settings, settings
from tests.cli.models import make_base, make_tuned


def findings(flora, *words, code=0):
    """(status, detail and fix in one text) of every check, by its name; the last of several counts."""
    rows = flora("doctor", *words, "--json", code=code).json["checks"]
    return {row["check"]: (row["status"], f"{row['detail']} | {row['fix']}") for row in rows}


def test_what_is_not_well_always_comes_with_what_to_do(flora, monkeypatch):
    monkeypatch.setitem(sys.modules, "zmq", None)
    monkeypatch.setenv("FLORA_REGISTRY", "/somewhere")

    rows = flora("doctor", "--json").json["checks"]

    assert {row["check"] for row in rows if row["status"] == "warning"} >= {"server libraries", "settings"}
    assert all(row["fix"] for row in rows if row["status"] != "ok")
    assert "pip install 'flora-adapters[serve]'" in findings(flora)["server libraries"][1]


def test_a_misspelt_variable_is_pointed_out(flora, monkeypatch):
    monkeypatch.setenv("FLORA_HOEM", "/data")

    assert "FLORA_HOEM | it may be meant as FLORA_HOME" in findings(flora)["settings"][1]


def test_no_variable_that_the_code_reads_is_called_strange():
    package = Path(health.__file__).parents[1]
    read = {name for file in package.rglob("*.py") for name in re.findall(r"""["'`](FLORA_\w+)""", file.read_text())}
    read |= {f"FLORA_{field.upper()}" for field in Settings.model_fields}

    assert len(read) >= 5
    assert read <= set(health._VARIABLES + health._OWN_VARIABLES)


def test_settings_that_do_not_fit_are_a_finding_and_no_end_of_the_check(flora, monkeypatch):
    monkeypatch.setenv("FLORA_DEBUG", "perhaps")
    settings.cache_clear()

    found = findings(flora, code=3)

    assert found["settings"][0] == "failed"
    assert "debug" in found["settings"][1]
    assert found["torch"][0] == "ok"


def test_a_key_of_the_settings_file_that_nothing_reads_is_pointed_out(flora):
    Path("flora.toml").write_text('hom = "/data"\n')

    assert "nothing reads hom in flora.toml" in flora("doctor").out


def test_a_home_that_cannot_be_written_to_is_a_failure(flora, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLORA_HOME", str(tmp_path / "file" / "home"))
    settings.cache_clear()

    status, told = findings(flora, code=3)["home"]

    assert status == "failed"
    assert "FLORA_HOME" in told


def test_a_registry_that_is_not_where_it_was_named_is_a_failure_and_none_yet_is_not(flora, tmp_path):
    assert findings(flora)["registry"] == ("ok", "none yet | None")

    done = flora("doctor", "--registry", tmp_path / "nowhere", code=3)

    assert "error[FL-CHECK]: the check of registry failed" in done.err


def test_a_base_that_was_moved_is_pointed_out(flora, tmp_path):
    base = make_base(tmp_path / "moved-base")
    flora("extract", base, make_tuned(base, tmp_path / "tuned"), "--rank", 1, "--name", "sql")
    shutil.rmtree(base)

    status, told = findings(flora)["base"]

    assert status == "warning"
    assert "moved-base, the base of 1 adapters, is not at" in told
    assert "flora serve BASE" in told


@pytest.mark.parametrize(
    ("module", "check"), [("torch", "torch"), ("fastapi", "server libraries")], ids=["torch", "fastapi"]
)
def test_a_library_that_is_missing_is_named(flora, monkeypatch, module, check):
    monkeypatch.setitem(sys.modules, module, None)  # Python's own word for a module that cannot be imported

    status, told = findings(flora, code=None)[check]

    assert status != "ok"
    assert module in told
    assert "pip install" in told


def test_a_gpu_that_this_torch_cannot_use_is_a_failure(flora, monkeypatch):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("torch can use the GPU of this machine")
    monkeypatch.setattr(health, "gpus", lambda: [Gpu("NVIDIA T4", 16 << 30)])

    status, told = findings(flora, code=3)["gpu"]

    assert status == "failed"
    assert "NVIDIA T4" in told
    assert "--device cpu" in told


def test_a_port_that_is_taken_is_told(flora, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setattr(health, "_PORT", other.getsockname()[1])
        assert "--port" in findings(flora)[f"port {other.getsockname()[1]}"][1]
