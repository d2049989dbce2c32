"""What every test shares: quiet threads, a home of its own, and how thorough random tests are."""

import os

# Before torch is imported: threads that spin while they wait starve the other test process on a small machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import functools
import logging
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# Files of few tests that take long, longest first: started first, so that no process is left with one at the end.
LONG_FILES = (
    "cli/test_demo.py",
    "real/test_real_embeddings.py",
    "kernels/test_interpreter.py",
    "real/test_real_pair.py",
    "registry/test_crashes.py",
    "serve/api/test_lifecycle.py",
)
IS_FULL = os.environ.get("FLORA_FULL") == "1"  # `make test-long`

# The usual run draws the same examples every time, so that it fails for what was changed and for nothing else.
# Neither run fails for being slow: that depends on who else uses the machine.
PATIENT = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("usual", derandomize=True, **PATIENT)
hypothesis.settings.register_profile("full", max_examples=2000, **PATIENT)
hypothesis.settings.load_profile("full" if IS_FULL else "usual")


def examples(usual: int) -> int:
    """How many examples to draw where the profile's number is too many: ten times as many at full figures."""
    return 10 * usual if IS_FULL else usual


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    ranks = {folder / file: rank for rank, file in enumerate(LONG_FILES)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.fixture(autouse=True, scope="session")
def _home_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing that a test does reaches the registry or the caches of whoever runs it."""
    from flora.config import settings

    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLORA_HOME", str(home))
        patch.delenv("FLORA_REGISTRY_URL", raising=False)
        settings.cache_clear()
        yield home
    settings.cache_clear()


@pytest.fixture(autouse=True, scope="session")
def _commands_are_built_once() -> Iterator[None]:
    """Typer builds all commands anew from their signatures whenever one is run: most of the time of a short one."""
    import typer.main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture(autouse=True)
def _log_levels_are_a_tests_own() -> Iterator[None]:
    """A command that runs in this process sets levels as for a process of its own."""
    loggers = [logging.getLogger(name) for name in (None, "flora", "flora.serve")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
