from collections.abc import Iterator
from pathlib import Path

import pytest

from flora.registry import Registry, Version
from tests.registry.adapters import random_adapter


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """An empty registry."""
    with Registry.open(tmp_path / "registry") as opened:
        yield opened


@pytest.fixture
def three(registry: Registry) -> list[Version]:
    """sql with v1 to v3, chat with v1; the versions of sql."""
    versions = [registry.add(random_adapter(seed), "sql") for seed in range(3)]
    registry.add(random_adapter(9), "chat")
    return versions
