"""Where a registry lies, and who writes to it."""

import os
import pwd
from pathlib import Path

from flora.errors import UsageError

INDEX_FILE = "index.sqlite"


def locate(url: str | Path | None) -> tuple[Path, Path]:
    """(folder, index file) of the registry `url`: a folder, `sqlite:///FILE`, or None for what the settings name."""
    if url is None:
        from flora.config import settings

        url = settings().registry_url or settings().registry_dir
    text = str(url)
    if text.startswith("sqlite:///"):
        file = Path(text.removeprefix("sqlite:///")).expanduser()
        return file.parent, file
    if "://" in text:
        raise UsageError(
            f"{text} is no registry that this Flora can use",
            fix="name a folder, or an index file as sqlite:///path/index.sqlite",
        )
    root = Path(url).expanduser()
    return root, root / INDEX_FILE


def current_user() -> str:
    """The name that an alias's history keeps."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container may run under an id without a name
        return f"uid {os.getuid()}"
