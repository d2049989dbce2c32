"""Work that ends when its client leaves. Nothing else would tell: a handler that only computes never hears of it."""

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

_T = TypeVar("_T")


class ClientLeft(Exception):
    """The connection closed before the answer was there. Nobody reads what is sent now."""


async def until_disconnect(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """The work's result. The request's body must have been read. Raises ClientLeft, once the work is cancelled."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeft
    finally:
        for unfinished in (task, watch):
            unfinished.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await unfinished


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
