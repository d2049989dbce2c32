"""`python -m flora.serve.engine --config FILE --endpoint ipc://… --parent PID`: what `flora serve` starts."""

import argparse
import logging
import sys
from pathlib import Path

from flora.errors import FloraError
from flora.serve.engine.process import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flora.serve.engine", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="EngineConfig as JSON")
    parser.add_argument("--endpoint", required=True, help="ZeroMQ address to bind, such as ipc:///run/flora/engine")
    parser.add_argument("--parent", type=int, required=True, help="id of the process that starts it: it ends with that")
    arguments = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        return run(arguments.config, arguments.endpoint, arguments.parent)
    except FloraError as error:
        logging.getLogger("flora.serve.engine").error("%s", error)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
