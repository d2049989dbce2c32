"""Writers that are cut off, run out of disk, or meet each other."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import IS_FULL

ROOT = Path(__file__).parents[2]
STRIDE = "1" if IS_FULL else "2"  # every how many points a change is cut off
MEMORY = Path("/dev/shm")  # what is proved here is order, and not that fsync waits for a disk


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as path:
        yield Path(path)


def run(*arguments: str) -> list[dict]:
    """The JSON lines that one of this folder's scripts prints; its processes fork, so it runs in one of its own."""
    finished = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "Traceback" not in finished.stderr, finished.stderr
    return [json.loads(line) for line in finished.stdout.splitlines()]


def check(changes: list[dict], ending: str) -> int:
    """Whether each change, at each point that was tried, ended so and left a sound registry; the number of points."""
    num_points = 0
    for change in changes:
        assert change["violations"] == [], change["change"]
        assert change["endings"].pop("done") == 1
        in_spite = change["endings"].pop("in spite", 0)  # of an error while tidying up, which does not matter
        assert in_spite <= (80 if change["change"] == "add a sibling" else 5)  # once it is added, it is cut up
        assert set(change["endings"]) == {ending}
        num_points += change["endings"][ending] + in_spite
    return num_points


def test_a_change_that_is_killed_at_any_point_leaves_a_sound_registry(folder):
    changes = run("tests.registry.crash_points", "kill", str(folder), STRIDE)

    assert len(changes) == 8
    assert check(changes, ending="killed") > 150 // int(STRIDE)


def test_a_disk_that_is_full_at_any_point_is_an_error_and_leaves_a_sound_registry(folder):
    changes = run("tests.registry.crash_points", "full", str(folder), STRIDE, "add to a known name", "move an alias")

    assert check(changes, ending="refused") > 50 // int(STRIDE)


@pytest.mark.long
@pytest.mark.parametrize("fault", ["full", "broken"])
def test_a_disk_that_fails_at_any_point_of_any_change_leaves_a_sound_registry(folder, fault):
    changes = run("tests.registry.crash_points", fault, str(folder), STRIDE)

    assert len(changes) == 8
    assert check(changes, ending="refused") > 150 // int(STRIDE)


def test_writers_at_the_same_time_lose_nothing(folder):
    (result,) = run("tests.registry.writers", str(folder))

    assert result["failed"] == 0
    assert result["told"] == 40
    assert result["lost"] == []
    assert result["problems"] == []
    assert result["shared"] == list(range(1, 21))
    assert (result["moves"], result["chain"]) == (20, True)
    assert result["names"] == ["own-0", "own-1", "own-2", "own-3", "shared"]
    assert result["rebuilt"]
    assert (result["in_parts"], result["stored_twice"]) == (40, 0)


def test_a_limit_of_the_system_is_an_error_and_leaves_nothing_half_written(folder):
    script = f"""
import resource
from pathlib import Path
from flora.errors import StoreError
from flora.registry import Registry
from tests.registry.adapters import Q_PROJ, random_adapter

registry = Registry.open(Path({str(folder)!r}) / "registry")
before = registry.add(random_adapter(), "sql")
large = random_adapter(ranks={{Q_PROJ: 2000}})
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))  # the weights have 256 kB
try:
    registry.add(large, "sql")
except StoreError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert registry.fsck() == [], registry.fsck()
assert registry.resolve("sql") == before
registry.add(large, "sql")
assert registry.load(registry.resolve("sql")).header == large.header
"""
    finished = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)

    assert finished.returncode == 0, finished.stderr
    assert "error[FL-STORE]" in finished.stdout
    assert "the file is larger than this system lets it be" in finished.stdout
