"""A Flora server under measurement, in processes of its own: `python -m flora.bench.own_server` with its configuration.

Reads a ServeConfig from stdin and writes its URL to stdout once it serves; its log goes to stderr.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from flora.child_process import end_child
from flora.errors import FloraError, ServeError
from flora.serve import ServeConfig, serve
from flora.serve.config import decode_engine_config, encode_engine_config

_END_TIMEOUT_S = 30.0
_LAST_LINES = 15
_SERVING = "serving at "  # what `serve` logs before the URL


@contextmanager
def running_server(config: ServeConfig, log: Path) -> Iterator[str]:
    """The URL of a server that is ready; its log goes to a file. Raises ServeError with its last words."""
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "flora.bench.own_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(_encode(config))
        process.stdin.close()
        url = process.stdout.readline().decode().strip()  # empty if it ends first
        if not url:
            process.wait()
            last = log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
            raise ServeError("the server under measurement did not come up", cause="\n".join(last) or "it said nothing")
        yield url
    finally:
        end_child(process, _END_TIMEOUT_S)
        process.stdout.close()


def _encode(config: ServeConfig) -> bytes:
    """Two lines of JSON: the engine's part, which has paths, and the rest."""
    rest = {name: getattr(config, name) for name in config.__struct_fields__ if name != "engine"}
    return encode_engine_config(config.engine) + b"\n" + msgspec.json.encode(rest)


def _decode(data: bytes) -> ServeConfig:
    engine, _, rest = data.partition(b"\n")
    return msgspec.convert({"engine": decode_engine_config(engine)} | json.loads(rest), ServeConfig)


class _TellUrl(logging.Handler):
    """Writes the URL to stdout when the server logs that it serves."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith(_SERVING):
            sys.stdout.write(message.removeprefix(_SERVING).partition(" ")[0] + "\n")
            sys.stdout.flush()


def main() -> int:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    launch = logging.getLogger("flora.serve.launch")
    launch.setLevel(logging.INFO)
    launch.addHandler(_TellUrl())
    try:
        serve(_decode(sys.stdin.buffer.read()))
    except FloraError as error:
        logging.getLogger(__name__).error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
