"""What `flora serve` finds out before it starts: which base, which adapter to merge, which keys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flora.errors import NotFound, UsageError

if TYPE_CHECKING:
    from flora.registry import Registry, Version
    from flora.serve.request import AdapterTarget


def find_base(registry: Registry, source: str | None, merged: Version | None) -> tuple[Path, str]:
    """Folder and name of the base to serve: the one that is given, or the one that the registry's adapters share.

    merged  the one adapter that is to be served, if it is one
    """
    from flora.checkpoint import locate_checkpoint, open_checkpoint

    if source is not None:
        checkpoint = open_checkpoint(locate_checkpoint(source))
        return checkpoint.path, checkpoint.name
    used = [entry for entry in registry.bases() if entry.num_adapters > 0]
    if merged is not None and merged.base_id is not None:
        used = [entry for entry in used if entry.base_id == merged.base_id]
    if not used:
        lacking = "adapters whose base is known" if registry.names(limit=1) else "adapters"
        raise UsageError(
            f"the registry has no {lacking}, so nothing says which base to serve",
            fix="give it: flora serve BASE; or make an adapter first: flora extract BASE TUNED",
        )
    if len(used) > 1:
        listed = "; ".join(
            f"{entry.name} with {entry.num_adapters}, at {entry.path or 'no known place'}" for entry in used
        )
        raise UsageError(
            f"the registry's adapters belong to {len(used)} bases", cause=listed, fix="say which: flora serve BASE"
        )
    (entry,) = used
    if entry.path is None or not entry.path.is_dir():
        raise NotFound(
            f"where the base {entry.name} lies is not known",
            cause=f"{entry.path} is gone" if entry.path else "its adapters came here without it",
            fix="give its folder or Hub id: flora serve BASE",
        )
    return entry.path, entry.name


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of the file, one a line, blank lines and # comments aside. Raises UsageError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the key file {path} cannot be read", cause=str(error), fix="give a text file with one key a line"
        ) from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.strip().startswith("#"))
    if not keys:
        raise UsageError(f"the key file {path} holds no key", fix="write one key a line")
    return keys


def merged_target(version: Version, reference: str) -> AdapterTarget:
    """What the engine merges into its base."""
    from flora.serve.request import AdapterTarget

    return AdapterTarget(serving_digest=version.serving_digest, version_digest=version.digest, label=reference)
