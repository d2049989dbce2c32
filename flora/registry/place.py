"""Where a registry lies, and who writes to it."""

import os
import pwd
from pathlib import Path

from flora.errors import UsageError

INDEX_FILE = "index.sqlite"


def locate(url: str | Path | None) -> tuple[Path, Path | str]:
    """(folder, index) of the registry `url`: a folder, `sqlite:///FILE`, `postgresql://…`, or None for the settings'.

    The index is a file, or a PostgreSQL URL, whose blobs lie in the folder that its `blobs=` names; without one, in the
    settings' registry folder. All who share the database must see that folder.
    """
    if url is None:
        from flora.config import settings

        url = settings().registry_url or settings().registry_dir
    text = str(url)
    if text.startswith("sqlite:///"):
        file = Path(text.removeprefix("sqlite:///")).expanduser()
        return file.parent, file
    if text.startswith(("postgresql://", "postgresql+psycopg://")):
        return _locate_postgres(text)
    if "://" in text:
        raise UsageError(
            f"{text} is no registry that this Flora can use",
            fix="name a folder, an index file as sqlite:///path/index.sqlite, or postgresql://host/db?blobs=/folder",
        )
    root = Path(url).expanduser()
    return root, root / INDEX_FILE


def _locate_postgres(text: str) -> tuple[Path, str]:
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(text).set(drivername="postgresql+psycopg")
    except (ArgumentError, ValueError) as error:
        raise UsageError("the registry's URL cannot be read", cause=str(error), fix="postgresql://host/db") from error
    blobs = url.query.get("blobs")
    if isinstance(blobs, tuple):
        raise UsageError("the registry's URL names several blobs folders", fix="give blobs= once")
    if blobs is None:
        from flora.config import settings

        blobs = str(settings().registry_dir)
    index = url.difference_update_query(["blobs"])
    return Path(blobs).expanduser(), index.render_as_string(hide_password=False)


def current_user() -> str:
    """The name that an alias's history keeps."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container may run under an id without a name
        return f"uid {os.getuid()}"
