"""What the engine and a loader process say to each other: MessagePack over a socket pair, one load at a time.

engine ── Read ──► loader ── Found ──► engine ── Pack ──► loader ── Packed ──► engine
                      └───── Failed ──────────────────────────┘

A Read in place of Pack: there is no room for what was found, and the next adapter's turn.
"""

import msgspec

from flora.serve.engine.layout import AdapterTable
from flora.serve.request import AdapterTarget


class Read(msgspec.Struct, frozen=True, tag=True):
    target: AdapterTarget


class Found(msgspec.Struct, frozen=True, tag=True):
    """The adapter exists, belongs to the base, and needs this much room."""

    num_cells: int


class Pack(msgspec.Struct, frozen=True, tag=True):
    start: int  # byte of the arena


class Packed(msgspec.Struct, frozen=True, tag=True):
    table: AdapterTable
    load_s: float  # without the wait for room


class Failed(msgspec.Struct, frozen=True, tag=True):
    code: str
    what: str
    cause: str | None
    fix: str | None


ToLoader = Read | Pack
FromLoader = Found | Packed | Failed
