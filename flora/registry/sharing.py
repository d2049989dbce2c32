"""Equal large tensors of different weights files, stored once.

An adapter is stored whole, but for tensors that are blobs already, and its rows tell which large tensors it has. Once
they are committed, each file that has a tensor in common with another one is cut up (cutting.py): parts are written,
and under the write lock, while no gc can take a part, the list of them takes the file's place. Cut off anywhere, all
versions stay readable; what is left to do, the next gc does. A file that shares nothing stays as it was written.
"""

import contextlib
import fcntl
import logging
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import sqlalchemy as sa

from flora.errors import FloraError, StoreError
from flora.names import Digest
from flora.registry import needs
from flora.registry.cutting import put_cut
from flora.registry.disk import store_error
from flora.registry.formats.tensors import stored_pieces
from flora.registry.home import Home
from flora.registry.parts import Part
from flora.registry.records import Version
from flora.registry.store import BlobStore

logger = logging.getLogger(__name__)

_Plan = Mapping[str, Collection[str]]  # weights file -> tensors to be cut out of it


def share(home: Home, weights: Collection[str]) -> None:
    """Cuts up those of the weights files that have tensors in common with others, and those others.

    What cannot be cut, on a full disk for one, stays whole, and a warning says so: the versions are stored already.
    """
    if not weights:
        return
    try:
        with home.reading() as connection:
            if not needs.common_tensors(connection, weights):
                return
        with _turn(home.root):
            with home.reading() as connection:
                plan = _plan(connection, home.store, weights)
            _cut(home, plan)
    except StoreError as error:
        logger.warning("equal tensors stored twice until the next gc: %s", error.what)


def share_all(home: Home, *, dry_run: bool = False) -> int:
    """As `share`, of everything that is still to be cut; the bytes that this frees, or with `dry_run` would free."""
    with home.reading() as connection:
        common = needs.common_tensors(connection)
    plan: dict[str, set[str]] = defaultdict(set)
    copies: dict[str, int] = defaultdict(int)
    sizes = {tensor: size for _, tensor, size in common}
    for file, tensor, _ in common:
        plan[file].add(tensor)
    todo = {  # what is there whole and in parts is `collect`'s
        file: tensors
        for file, tensors in plan.items()
        if not _is_cut(home.store, file, tensors) and not _has_list(home.store, file, tensors)
    }
    for tensors in todo.values():
        for tensor in tensors:
            copies[tensor] += 1
    num_bytes = sum((n - _is_absent(home.store, tensor)) * sizes[tensor] for tensor, n in copies.items())
    if todo and not dry_run:
        with _turn(home.root):
            _cut(home, todo)
    return num_bytes


def shared_bytes(home: Home, version: Version) -> int:
    """How many bytes of the version's weights are stored once for it and others."""
    weights = home.manifest(version).weights.digest
    if home.store.is_whole(Digest(weights)):
        return 0
    with home.reading() as connection:
        return sum(size for _, _, size in needs.common_tensors(connection, [weights]))


def _plan(connection: sa.Connection, store: BlobStore, weights: Collection[str]) -> _Plan:
    plan: dict[str, set[str]] = defaultdict(set)
    for file, tensor, _ in needs.common_tensors(connection, weights):
        plan[file].add(tensor)
    new = {tensor for tensors in plan.values() for tensor in tensors if _is_absent(store, tensor)}
    for file, tensor in needs.holders(connection, new):  # of a tensor that is a blob, the others were cut before
        plan[file].add(tensor)
    return plan


def _cut(home: Home, plan: _Plan) -> None:
    for file, tensors in sorted(plan.items()):
        if parts := _put_parts(home.store, file, tensors):
            with home.writing():  # one at a time: each waits for the disk
                home.store.replace_by_parts(Digest(file), parts)


def _put_parts(store: BlobStore, file: str, tensors: Collection[str]) -> Sequence[Part] | None:
    """Writes what the file shall be cut into; None if there is nothing to cut, or it cannot be."""
    if _is_cut(store, file, tensors):
        return None
    digest = Digest(file)
    try:
        known = {part.digest for part in store.parts(digest) or ()}
        pieces = (data for _, data in stored_pieces(store.mapped(digest)))
        written, parts = put_cut(store, pieces, known | set(tensors))
    except FloraError as error:
        logger.warning("weights not shared digest=%s: %s", file, error.what)
        return None
    if written.digest != file:
        logger.warning("weights not shared digest=%s: the file is damaged", file)
        return None
    return parts


def _is_cut(store: BlobStore, file: str, tensors: Collection[str]) -> bool:
    """Whether the file lies in parts, these tensors among them; or it is gone, or cannot be read."""
    return not store.is_whole(Digest(file)) and (not store.parts(Digest(file)) or _has_list(store, file, tensors))


def _has_list(store: BlobStore, file: str, tensors: Collection[str]) -> bool:
    return {part.digest for part in store.parts(Digest(file)) or ()} >= set(tensors)


def _is_absent(store: BlobStore, tensor: str) -> bool:
    return store.size(Digest(tensor)) is None


@contextlib.contextmanager
def _turn(root: Path) -> Iterator[None]:
    """One process at a time, so that no two cut a file in different ways; without its turn nothing would be lost."""
    with contextlib.ExitStack() as held:
        try:
            fcntl.flock(held.enter_context((root / "sharing.lock").open("ab")), fcntl.LOCK_EX)
        except OSError as error:
            raise store_error(f"the registry's folder {root} cannot be locked", error) from error
        yield
