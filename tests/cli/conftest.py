"""The command line in this process: what it printed, and how it ended."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flora.cli import main
from flora.config import settings
from tests.cli.models import make_base, make_tuned
from tests.cli.schemas import check_answer


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def rows(self) -> list[list[str]]:
        """The cells of a TSV table, its heading first."""
        return [line.split("\t") for line in self.out.splitlines()]


Flora = Callable[..., Done]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("checkpoints") / "tiny-base")


@pytest.fixture(scope="session")
def tuned(base: Path) -> Path:
    return make_tuned(base, base.parent / "tiny-tuned")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty FLORA_HOME, and an empty working folder."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("FLORA_HOME", str(tmp_path / "home"))
    settings.cache_clear()
    yield tmp_path / "home"
    settings.cache_clear()


@pytest.fixture
def flora(home: Path, capfd: pytest.CaptureFixture[str]) -> Flora:
    """Runs one command line. Streams are pipes, so tables come as TSV; what comes as JSON is as its schema says."""

    def run(*words: object, code: int | None = 0) -> Done:
        capfd.readouterr()
        ended = main([str(word) for word in words])
        done = Done(ended, *capfd.readouterr())
        assert code is None or ended == code, done.err
        if "--json" in words and ended == 0:
            check_answer([str(word) for word in words], done.json)
        return done

    return run


@pytest.fixture(scope="session")
def home_with_an_adapter(base: Path, tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLORA_HOME whose registry holds `sql@v1`, for tests to copy."""
    home = tmp_path_factory.mktemp("stored") / "home"
    words = ["extract", base, tuned, "--rank", 8, "--name", "sql", "--registry", home / "registry", "-q"]
    assert main([str(word) for word in words]) == 0
    return home


@pytest.fixture
def stored(flora: Flora, home: Path, home_with_an_adapter: Path) -> Flora:
    """With one adapter, `sql@v1`, in the registry."""
    shutil.copytree(home_with_an_adapter, home)
    return flora
