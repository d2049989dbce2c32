"""What the routes of one server share."""

import asyncio
import contextlib
import time
from dataclasses import dataclass, field

from flora.serve.api.metrics import Metrics
from flora.serve.config import ServeConfig
from flora.serve.frontend.client import EngineClient
from flora.serve.frontend.models import Models
from flora.serve.frontend.prompts import Prompts
from flora.serve.frontend.tokenizer import Tokenizer


@dataclass(slots=True, eq=False)
class ServerState:
    """One front end. The event loop owns it."""

    config: ServeConfig
    client: EngineClient
    models: Models
    prompts: Prompts
    tokenizer: Tokenizer
    metrics: Metrics
    started_s: int = field(default_factory=lambda: int(time.time()))  # Unix time
    is_draining: bool = False
    num_requests: int = 0  # being answered now
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def request_begins(self) -> None:
        self.num_requests += 1
        self._idle.clear()

    def request_ends(self) -> None:
        self.num_requests -= 1
        if not self.num_requests:
            self._idle.set()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Whether no request is left within that time."""
        if self.num_requests:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), timeout_s)
        return not self.num_requests

    @property
    def trouble(self) -> str | None:
        """Why requests cannot be served; None if they can."""
        if self.is_draining:
            return "the server is shutting down"
        return self.client.error.what if self.client.error else None
