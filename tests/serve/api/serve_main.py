"""`flora serve` without a command line: reads a ServeConfig from stdin, as `encode` writes it. Imports no torch."""

import json
import logging
import sys

import msgspec

from flora.errors import FloraError
from flora.serve import ServeConfig, serve
from flora.serve.config import decode_engine_config, encode_engine_config


def encode(config: ServeConfig) -> str:
    """Two lines of JSON: the engine's part, which has paths, and the rest."""
    rest = {name: getattr(config, name) for name in config.__struct_fields__ if name != "engine"}
    return f"{encode_engine_config(config.engine).decode()}\n{msgspec.json.encode(rest).decode()}"


def decode(text: str) -> ServeConfig:
    engine, rest = text.split("\n")
    return msgspec.convert({"engine": decode_engine_config(engine.encode())} | json.loads(rest), ServeConfig)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    try:
        serve(decode(sys.stdin.read()))
    except FloraError as error:
        logging.error("%s", error)
        sys.exit(error.exit_code)
