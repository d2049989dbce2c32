"""Settings: variable over project file over default."""

from pathlib import Path

import pytest

from flora.config import Settings, settings
from flora.errors import UsageError


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """No FLORA_* of the person who runs the tests, and an empty working folder."""
    import os

    for name in [name for name in os.environ if name.startswith("FLORA_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    settings.cache_clear()
    yield
    settings.cache_clear()


def test_a_variable_wins_over_the_project_file(tmp_path, monkeypatch):
    (tmp_path / "flora.toml").write_text('home = "/from/file"\ndebug = true\n')
    assert settings().home == Path("/from/file")

    settings.cache_clear()
    monkeypatch.setenv("FLORA_HOME", "/from/variable")

    assert settings().home == Path("/from/variable")
    assert settings().debug is True


def test_everything_lies_under_home(monkeypatch):
    monkeypatch.setenv("FLORA_HOME", "/somewhere")

    assert settings().registry_dir == Path("/somewhere/registry")
    assert settings().cache_dir == Path("/somewhere/cache")
    assert settings().registry_url is None


def test_a_flag_wins_over_a_variable(monkeypatch):
    monkeypatch.setenv("FLORA_HOME", "/from/variable")

    assert Settings(home=Path("/from/flag")).home == Path("/from/flag")


@pytest.mark.parametrize("text", ["home = ", "debug = 7"])
def test_a_file_that_does_not_fit_is_a_usage_error(tmp_path, text):
    (tmp_path / "flora.toml").write_text(text)

    with pytest.raises(UsageError, match="settings do not fit"):
        settings()


def test_a_variable_that_does_not_fit_is_a_usage_error(monkeypatch):
    monkeypatch.setenv("FLORA_DEBUG", "perhaps")

    with pytest.raises(UsageError, match="debug"):
        settings()
