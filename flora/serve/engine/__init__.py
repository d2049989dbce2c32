"""The engine: one base, a pool of pages, and a loop that serves any of its adapters in one batch."""

from flora.serve.engine.build import build_engine
from flora.serve.engine.engine import Engine
from flora.serve.engine.rebuild import rebuild_engine

__all__ = ["Engine", "build_engine", "rebuild_engine"]
