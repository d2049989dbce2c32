from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.api.servers import Server, World, make_world, running


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A base and three adapters of it, one of them with two versions."""
    world = make_world(tmp_path_factory.mktemp("world"))
    world.add(world.adapter(1), "sql")
    world.add(world.adapter(2), "sql")
    world.add(world.adapter(3), "team/poems")
    return world


@pytest.fixture(scope="session")
def server(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for every test that leaves it as it was."""
    temporary: Path = tmp_path_factory.mktemp("t")
    with running(world.config(), env={"TMPDIR": str(temporary)}) as server:
        yield server
        assert server.stop() == 0
        assert not list(temporary.iterdir()), "no folder is left behind"
