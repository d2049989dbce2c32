"""An adapter version made ready for a remote: its files and its card in a temporary folder, before anything is sent."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from flora.adapter import Adapter
from flora.registry.formats.card import model_card
from flora.registry.formats.paths import tree_paths
from flora.registry.formats.peft import CARD_FILE, OUR_FILES, Profile, save_peft
from flora.registry.records import Version
from flora.registry.remotes.address import open_remote
from flora.registry.remotes.remote import Outgoing


@dataclass(frozen=True, slots=True)
class PlannedFile:
    name: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class PushPlan:
    """What a push would write: the files lie in a temporary folder that lives as long as the plan."""

    repo: str
    files: tuple[PlannedFile, ...]
    card: str
    message: str  # of the commit
    is_private: bool
    _folder: tempfile.TemporaryDirectory[str] = field(repr=False)

    @property
    def folder(self) -> Path:
        return Path(self._folder.name) / "files"


def plan_push(
    adapter: Adapter,
    version: Version,
    repo: str,
    *,
    profile: Profile = "portable",
    is_private: bool = False,
    base: Path | None = None,
) -> PushPlan:
    """Everything that `push` will send, without asking the remote. Raises UsageError if `repo` is no address.

    base  folder of the adapter's base: its library may name the modules otherwise than the checkpoint does
    """
    open_remote(repo)
    folder = tempfile.TemporaryDirectory(prefix="flora-push-")
    path = Path(folder.name) / "files"
    save_peft(adapter, path, profile, tree_paths(base, adapter.header) if base else None)
    card = model_card(adapter, version, repo)
    (path / CARD_FILE).write_text(card)
    files = tuple(PlannedFile(file.name, file.stat().st_size) for file in sorted(path.iterdir()))
    return PushPlan(repo, files, card, f"{version.ref}, {version.digest}", is_private, folder)


def push(plan: PushPlan) -> str:
    """Sends the plan's files as one state; returns its address. Raises AuthError, RemoteError, UsageError."""
    names = tuple(file.name for file in plan.files)
    outgoing = Outgoing(plan.folder, names, plan.message, frozenset(OUR_FILES), plan.is_private)
    return open_remote(plan.repo).publish(outgoing)
