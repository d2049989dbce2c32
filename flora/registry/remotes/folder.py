"""A folder of this machine as a remote: a mounted share, or one adapter of NVIDIA NIM's source folder.

NIM's layout is a folder with one PEFT folder per adapter, whose name is the model's: `adapters_in` lists it.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from flora.digests import digest_file
from flora.errors import NotFound
from flora.registry.disk import store_error
from flora.registry.formats.peft import OUR_FILES, check_replaceable
from flora.registry.formats.peft_config import CONFIG_FILE
from flora.registry.remotes.remote import Interrupted, Listing, Outgoing, RemoteFile

_READ_BYTES = 1 << 20


class Folder:
    """One PEFT folder."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.address = str(self.path)

    def look(self, revision: str | None = None) -> Listing:
        """The adapter's files with their sha256: what changes while it is copied is noticed."""
        if revision is not None:
            raise NotFound(f"{self.address} is a folder, and has no revisions", fix="leave --revision out")
        if not self.path.is_dir():
            raise NotFound(f"there is no folder {self.address}", fix="check the path")
        try:
            files = [self._describe(path) for path in sorted(self.path.iterdir()) if path.is_file()]
        except OSError as error:
            raise store_error(f"{self.path} cannot be read", error) from error
        return Listing("", tuple(files))

    def _describe(self, path: Path) -> RemoteFile:
        sha256 = digest_file(path).hex if path.name in OUR_FILES else None  # others are never fetched
        return RemoteFile(path.name, path.stat().st_size, sha256=sha256)

    def read(self, listing: Listing, file: RemoteFile, offset: int, timeout_s: float) -> Iterator[bytes]:
        try:
            with (self.path / file.name).open("rb") as opened:
                opened.seek(offset)
                while piece := opened.read(_READ_BYTES):
                    yield piece
        except OSError as error:
            raise Interrupted(str(error)) from error

    def publish(self, outgoing: Outgoing) -> str:
        """Puts the new folder in the place of the old one by a rename. Raises UsageError if others' files are there."""
        check_replaceable(self.path)
        temporary = self.path.parent / f".{self.path.name}.{uuid.uuid4().hex}"
        aside = temporary.with_name(temporary.name + ".old")
        try:
            temporary.mkdir(parents=True)
            for name in outgoing.names:
                shutil.copyfile(outgoing.folder / name, temporary / name)
                with (temporary / name).open("rb") as copied:
                    os.fsync(copied.fileno())
            if self.path.exists():
                os.rename(self.path, aside)
            os.rename(temporary, self.path)
        except OSError as error:
            raise store_error(f"{self.path} cannot be written", error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(aside, ignore_errors=True)
        return self.address


def adapters_in(source: Path) -> list[Path]:
    """The PEFT folders directly under `source`, in the order of names: NIM's NIM_PEFT_SOURCE. Raises NotFound."""
    if not source.is_dir():
        raise NotFound(f"there is no folder {source}", fix="check the path")
    return sorted(path for path in source.iterdir() if not path.name.startswith(".") and (path / CONFIG_FILE).is_file())


def fingerprint(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """(name, bytes, mtime in ns) of the adapter's files: equal as long as nobody wrote to them."""
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.name in OUR_FILES]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
