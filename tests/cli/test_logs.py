"""What the log says, and what it must never say."""

import json
import logging
from collections.abc import Iterator

import pytest

from flora.cli.logs import configure_logs

SECRET = "sk-" + "of-a-client"  # in two parts: a traceback shows the lines of this file


@pytest.fixture(autouse=True)
def _handlers_are_a_tests_own() -> Iterator[None]:
    root = logging.getLogger()
    handlers = root.handlers
    yield
    root.handlers = handlers


def answer(api_key: str) -> None:
    """Fails with what a client sent in a local of its frame, as a request's head and body are in the server's."""
    raise RuntimeError(f"the answer to a key of {len(api_key)} characters broke off")


def log_a_failure() -> None:
    try:
        answer(SECRET)
    except RuntimeError:
        logging.getLogger("flora.serve").exception("request failed")


@pytest.mark.parametrize("as_json", [False, True])
def test_a_traceback_in_the_log_shows_where_and_no_values(capsys: pytest.CaptureFixture[str], as_json: bool):
    configure_logs(logging.INFO, as_json=as_json)

    log_a_failure()

    said = capsys.readouterr().err
    assert "request failed" in said
    assert "in answer" in said
    assert "RuntimeError: the answer to a key of 14 characters broke off" in said
    assert SECRET not in said
    assert not as_json or json.loads(said)["level"] == "error"
