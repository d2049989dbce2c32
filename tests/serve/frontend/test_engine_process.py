"""What the end of an engine is put down to, with another process in its place that only writes and exits."""

import asyncio
import sys

from flora.errors import CheckpointError, EngineDead, FloraError
from flora.serve.frontend.engine_process import EngineProcess

LOGGED = "2026-01-02 03:04:05,678"
LOADED = f"{LOGGED} INFO flora.serve.engine.supply adapter resident name=acme/secret-project rank=16"


def end_of(*lines: str, code: int = 1) -> FloraError:
    """What a process that writes these lines and exits is said to have died of."""

    async def ended() -> FloraError:
        script = f"import sys; sys.stderr.write({chr(10).join([*lines, ''])!r}); sys.exit({code})"
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stderr=asyncio.subprocess.PIPE)
        assert process.stderr is not None
        return await EngineProcess(process, process.stderr, endpoint="").ended()

    return asyncio.run(ended())


def test_what_other_users_did_is_no_cause():
    error = end_of(LOADED)

    assert isinstance(error, EngineDead)
    assert error.what == "the engine process ended: exit code 1"
    assert error.cause is None


def test_words_that_are_no_log_line_are_the_cause():
    error = end_of(LOADED, "Traceback (most recent call last):", '  File "x.py", line 1', "RuntimeError: out of memory")

    assert error.cause == "RuntimeError: out of memory"


def test_a_logged_error_is_the_cause():
    error = end_of(LOADED, f"{LOGGED} CRITICAL flora.serve.engine.process engine ends: its parent is gone parent=7")

    assert error.cause == "engine ends: its parent is gone parent=7"


def test_an_error_of_long_ago_is_no_cause():
    error = end_of(f"{LOGGED} ERROR flora.serve.engine.loading adapter load failed label=acme/secret-project", LOADED)

    assert error.cause is None


def test_an_error_of_ours_is_raised_as_the_error_it_was():
    error = end_of(
        LOADED,
        f"{LOGGED} ERROR flora.serve.engine error[FL-CHECKPOINT]: it is cut short",
        "cause: a full disk",
        "fix: x",
    )

    assert isinstance(error, CheckpointError)
    assert (error.what, error.cause, error.fix) == ("it is cut short", "a full disk", "x")
