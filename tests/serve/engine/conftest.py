from collections.abc import Callable
from pathlib import Path

import pytest

from tests.serve.engine.bases import make_base
from tests.serve.engine.worlds import World


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's base, made once a session."""
    made: dict[str, Path] = {}

    def base(family: str) -> Path:
        if family not in made:
            made[family] = make_base(family, tmp_path_factory.mktemp("base") / family)
        return made[family]

    return base


@pytest.fixture
def world(bases: Callable[[str], Path], tmp_path: Path) -> World:
    """A small Llama and an empty registry."""
    return World(bases("llama"), tmp_path)
