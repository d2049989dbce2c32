"""The engine: one base, a pool of pages, and a loop that serves any of its adapters in one batch."""

from flora.serve.engine.build import build_engine
from flora.serve.engine.engine import Engine

__all__ = ["Engine", "build_engine"]
