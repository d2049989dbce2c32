"""One base and any of its adapters behind OpenAI's HTTP routes.

    launch.py     starts the engine process and the front end, and ends both
    api/          HTTP: bodies, answers, errors, limits
    frontend/     what needs no HTTP and no torch: names to versions, text to tokens and back, the engine's client
    messages.py   what front end and engine say to each other;  request.py, config.py: what they are told
    engine/       the process that holds the weights

Importing this package imports no torch.
"""

from flora.serve.config import EngineConfig, ServeConfig

__all__ = ["EngineConfig", "ServeConfig", "serve"]


def serve(config: ServeConfig) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises FloraError if it cannot start."""
    from flora.serve.launch import serve as launch  # a client of the config alone needs no HTTP libraries

    launch(config)
