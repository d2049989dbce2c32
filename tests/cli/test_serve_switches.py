"""`flora serve`'s switches reach the engine: what the command line says is what the configuration holds."""

from typing import Any

import pytest

import flora.serve
from flora.cli import main
from flora.serve import EngineConfig, ServeConfig
from tests.cli.conftest import Flora


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServeConfig]:
    """What would have been served. The server's own part is shown elsewhere (tests/serve)."""
    configs: list[ServeConfig] = []
    monkeypatch.setattr(flora.serve, "serve", configs.append)
    return configs


SWITCHES: list[tuple[tuple[str, ...], str, Any]] = [
    (("--no-prefix-cache",), "prefix_cache", False),
    (("--no-fairness",), "fairness", False),
    (("--max-wait-s", "1.5"), "max_wait_s", 1.5),
    (("--slo-ttft-s", "6"), "slo_ttft_s", 6.0),
    (("--cluster", "8"), "cluster", 8),
    (("--no-prefetch",), "prefetch", False),
    (("--allow-base-mismatch",), "allow_base_mismatch", True),
    (("--adapter-dtype", "float8"), "adapter_dtype", "float8_e4m3fn"),
]


@pytest.mark.parametrize(("words", "field", "value"), SWITCHES)
def test_a_switch_changes_its_field_and_no_other(base, home, served, words, field, value):
    assert main(["serve", str(base), "--pool", "32MiB", "--host-cache", "16MiB"]) == 0
    assert main(["serve", str(base), "--pool", "32MiB", "--host-cache", "16MiB", *words]) == 0
    plain, switched = (config.engine for config in served)

    differing = {name for name in EngineConfig.__struct_fields__ if getattr(plain, name) != getattr(switched, name)}
    assert differing == {field}
    assert getattr(switched, field) == value


def test_a_host_cache_of_nothing_is_refused_before_a_loader_process_maps_it(base, home, served, capsys):
    assert main(["serve", str(base), "--pool", "32MiB", "--host-cache", "0", "--loaders", "1"]) == 2
    assert "error[FL-USAGE]: --host-cache 0 leaves 1 loader process no memory" in capsys.readouterr().err
    assert not served

    assert main(["serve", str(base), "--pool", "32MiB", "--host-cache", "0", "--loaders", "0"]) == 0
    assert served[0].engine.host_cache_bytes == 0


def test_references_to_preload_may_stand_in_one_list(base, home, served):
    assert main(["serve", str(base), "--preload", "sql,poems:prod", "--adapter", "chat"]) == 0

    assert served[0].preload == ("sql", "poems:prod", "chat")


def test_merge_names_a_version_and_its_base(base, tuned, flora: Flora, served):
    flora("extract", base, tuned, "--rank", 2, "--name", "sql")
    version = flora("show", "sql", "--json").json

    done = flora("serve", "--merge", "sql")

    assert done.code == 0
    [config] = served
    assert config.engine.base == base
    assert config.engine.merge is not None
    assert config.engine.merge.label == "sql"
    assert config.engine.merge.version_digest in str(version)


def test_merge_serves_one_adapter_only(base, home, served):
    assert main(["serve", str(base), "--merge", "sql", "--adapter", "poems"]) == 2
    assert not served


def test_an_adapter_that_is_not_there_is_not_merged(base, home, served):
    assert main(["serve", str(base), "--merge", "nobody"]) == 5
    assert not served
