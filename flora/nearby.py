"""What a user may have meant by a path that leads nowhere: folders that are spelled alike, or lie further inside."""

from difflib import get_close_matches
from pathlib import Path


def spelled_alike(path: Path) -> Path | None:
    """A folder beside `path` whose name is nearly the same, upper and lower case aside."""
    try:
        beside = {entry.name.lower(): entry for entry in path.parent.iterdir() if entry.is_dir()}
    except OSError:
        return None
    near = get_close_matches(path.name.lower(), beside, 1)
    return beside[near[0]] if near else None


def with_weights_inside(folder: Path) -> Path | None:
    """The folder directly under `folder` that holds safetensors, such as a trainer's checkpoint-500: the latest one."""
    found = {file.parent for file in folder.glob("*/*.safetensors")}
    return max(found, key=lambda inner: (inner.stat().st_mtime, inner.name), default=None)
