"""What the registry answers with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Literal


class Unset(Enum):
    """The type of "not given", where None already means "absent"."""

    UNSET = "unset"


UNSET = Unset.UNSET


@dataclass(frozen=True, slots=True)
class Version:
    """One version of one name, as the index lists it; its weights are read only by `Registry.load`."""

    name: str
    number: int  # from 1, per name, never given twice
    digest: str  # sha256:… of the manifest: the version's identity
    serving_digest: str  # sha256:… of what changes an answer
    created_at: datetime  # UTC
    base_id: str | None
    base_name: str
    max_rank: int
    num_modules: int
    num_bytes: int  # of the weights, as one file
    kept_share: float | None  # of the whole change's energy; None where there is no report
    operation: str  # extract, prune, import or merge
    parents: tuple[str, ...]  # version digests

    @property
    def ref(self) -> str:
        return f"{self.name}@v{self.number}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a listing."""

    name: str
    version: Version  # what the bare name means: prod, else latest, else the newest
    aliases: dict[str, int]  # alias -> version number
    num_versions: int


@dataclass(frozen=True, slots=True)
class Search:
    """What a version must have to be found; what is not given matters not."""

    text: str = ""  # in its name, its base's name or a label, in any case
    labels: Mapping[str, str | None] = field(default_factory=dict)  # None: any value
    base: str | None = None  # name or base id
    min_energy: float | None = None  # of the whole change
    max_rank: int | None = None
    operation: str | None = None


@dataclass(frozen=True, slots=True)
class AliasMove:
    """One line of an alias's history. A digest of None: the alias did not exist, or was removed."""

    name: str
    alias: str
    digest: str | None
    previous: str | None
    actor: str
    reason: str
    moved_at: datetime  # UTC


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A version was served on other weights than its base's, because an operator let it."""

    base_id: str  # of the base that was served
    actor: str
    allowed_at: datetime  # UTC; the first time


@dataclass(frozen=True, slots=True)
class BaseEntry:
    """A base that adapters here belong to, and where it lies on this machine if that is known."""

    base_id: str
    name: str
    path: Path | None
    num_adapters: int  # versions that name it


@dataclass(frozen=True, slots=True)
class GcReport:
    """What a collection took, or with `dry_run` would take."""

    removed: tuple[str, ...]  # digests of blobs, and names of leftovers under tmp/
    num_bytes: int
    kept_young: int  # unreferenced too, but younger than the grace time: a writer may be about to name them
    dry_run: bool
    kept_leased: int = 0  # unreferenced, and in use by a running server
    num_shared_bytes: int = 0  # freed besides, because equal tensors that a crash left apart are now stored once


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it should be. `orphan` and `leftover` are harmless: `gc` takes them."""

    kind: Literal[
        "missing", "damaged", "index", "not_finite", "shape", "base", "alias", "journal", "orphan", "leftover"
    ]  # shape: of weights against their header; base: of the header against the base's record
    subject: str  # a reference, a digest or a file name
    what: str
    fix: str

    @property
    def is_harmless(self) -> bool:
        return self.kind in ("orphan", "leftover")
