from collections.abc import Iterator
from pathlib import Path

import pytest

from flora.registry import Registry


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """An empty registry."""
    with Registry.open(tmp_path / "registry") as opened:
        yield opened
