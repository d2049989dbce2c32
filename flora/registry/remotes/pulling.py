"""An adapter from a remote, checked before it is believed: listed, refused early, fetched, verified, read.

An unfinished pull leaves its files in a staging folder of that remote's state, where the next one goes on.
"""

import contextlib
import fcntl
import hashlib
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flora.adapter import EXTRAS, Adapter
from flora.errors import AdapterInvalid, CheckpointError, PickleRefused, RemoteError
from flora.registry.disk import store_error
from flora.registry.formats.peft import RECORD_FILE, load_peft
from flora.registry.formats.peft_config import CONFIG_FILE, read_config
from flora.registry.formats.peft_weights import WEIGHTS_FILE
from flora.registry.remotes.address import open_remote
from flora.registry.remotes.remote import Listing
from flora.registry.remotes.transfer import Limits, Report, fetch

_SMALL = (CONFIG_FILE, RECORD_FILE, *EXTRAS)
_MAX_SMALL_BYTES = 64 << 20  # flora.json of a large adapter lists every tensor
_PICKLE = re.compile(r"adapter_model.*\.(bin|pt|pth|pkl|ckpt)")
_STALE_S = 7 * 24 * 3600.0  # a pull that nobody came back to


@dataclass(frozen=True, slots=True, eq=False)
class Pulled:
    """What came, and from which state of the remote."""

    adapter: Adapter
    address: str
    revision: str
    num_bytes: int
    is_floras: bool  # it came with Flora's record; else it is an import, whose base is claimed and not proven


def pull(
    address: str,
    staging: Path,
    *,
    revision: str | None = None,
    limits: Limits | None = None,
    report: Report = lambda share, what: None,
) -> Pulled:
    """The adapter at `address`, every file verified by the digest that the remote tells.

    staging  folder for unfinished pulls, made if need be
    Raises RemoteError, AuthError, NotFound, and what `load_peft` raises: Unsupported (DoRA, …) before any weight is
    fetched, PickleRefused, AdapterInvalid, NotFinite.
    """
    limits = limits or Limits()
    remote = open_remote(address)
    listing = remote.look(revision)
    _check_listing(remote.address, listing)
    with _stage(staging, remote.address, listing) as folder:
        small = fetch(remote, listing, _SMALL, folder, limits, lambda share, what: None)
        is_floras = listing.file(RECORD_FILE) is not None
        read_config(folder / CONFIG_FILE, own=is_floras)
        weights = fetch(remote, listing, [WEIGHTS_FILE], folder, limits, report)
        num_bytes = sum(path.stat().st_size for path in (*small, *weights))
        return Pulled(load_peft(folder), remote.address, listing.revision, num_bytes, is_floras)


def _check_listing(address: str, listing: Listing) -> None:
    names = {file.name for file in listing.files}
    pickles = sorted(name for name in names if _PICKLE.fullmatch(name))
    if pickles and WEIGHTS_FILE not in names:
        raise PickleRefused(
            f"{address} has its weights as {pickles[0]} only, a pickle file that can run code when it is opened",
            fix="ask its owner for safetensors, or convert it where it is trusted: load it with peft and save it again",
        )
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in names:
            is_model = any(re.fullmatch(r"model.*\.safetensors", each) for each in names)
            raise AdapterInvalid(
                f"{address} holds no {name}, so it is no PEFT adapter",
                fix=f"it is a full checkpoint: `flora extract BASE {address}` makes an adapter of it"
                if is_model
                else None,
            )
    for file in listing.files:
        if file.name in _SMALL and file.num_bytes > _MAX_SMALL_BYTES:
            raise RemoteError(f"{file.name} of {address} is said to have {file.num_bytes} bytes, which none has")


@contextmanager
def _stage(staging: Path, address: str, listing: Listing) -> Iterator[Path]:
    """The staging folder of that state, ours alone; gone afterwards, unless a later run may go on with it."""
    state = "\n".join((address, listing.revision, *(f"{f.name} {f.num_bytes} {f.sha256}" for f in listing.files)))
    key = hashlib.sha256(state.encode()).hexdigest()[:32]
    folder = staging / key
    try:
        _forget_stale(staging)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise store_error(f"{folder} cannot be made", error) from error
    lock = staging / f"{key}.lock"
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RemoteError(
                f"another process is pulling {address} into {staging}", fix="wait for it, then run this again"
            ) from None
        try:
            yield folder
        except (AdapterInvalid, CheckpointError):  # whole, and not to be believed; others are gone on with
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def _forget_stale(staging: Path) -> None:
    limit = time.time() - _STALE_S
    for path in staging.glob("*"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < limit:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
