"""The promises of a registry, each a function that breaks off where one is not kept; its docstring is the promise.

Each is given an open registry, a name of its own, and the URL by which the registry can be opened again.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from flora.errors import AdapterNotFound, AliasConflict, UsageError
from flora.registry.records import Search
from flora.registry.registry import Registry

if TYPE_CHECKING:
    from flora.adapter import Adapter

_WRITERS = 8


def _adapter(seed: int, *, has_table: bool = False) -> "Adapter":
    """A small adapter whose numbers are those of `seed`; with a table of 1 MiB that is the same for every seed."""
    import torch

    from flora.adapter import BaseBinding, Recipe, make_adapter, report_of_factors
    from flora.lowrank import LowRank

    generator = torch.Generator().manual_seed(seed)
    factors = {
        "model.layers.0.self_attn.q_proj": LowRank(
            A=torch.randn(2, 16, generator=generator).bfloat16(),
            B=torch.randn(16, 2, generator=generator).bfloat16(),
            scale=1.0,
        )
    }
    base = BaseBinding(name="flora/conformance", base_id="sha256:" + "0" * 64)
    exact = {"model.embed_tokens.weight": torch.full((1024, 512), 0.5).bfloat16()} if has_table else None
    return make_adapter(factors, base, Recipe(operation="extract"), report_of_factors(factors), exact=exact)


def _require(condition: bool, failure: str) -> None:
    if not condition:  # no assert: it must hold under -O, too
        raise AssertionError(failure)


def _comes_back(registry: Registry, name: str, url: str | None) -> None:
    """What was added comes back bit for bit, through another opening too."""
    import torch

    added = registry.add(_adapter(1), name)
    with Registry.open(url) as other:
        loaded = other.load(other.resolve(name))
        with other.loading(added) as read:
            _require(read.header == loaded.header, "what is read and checked at once has another header")
    _require(loaded.header == _adapter(1).header, "the header differs")
    for module, factors in _adapter(1).factors.items():
        same = torch.equal(loaded.factors[module].A, factors.A) and torch.equal(loaded.factors[module].B, factors.B)
        _require(same, f"{module} differs")
    _require(registry.by_digest(added.digest).digest == added.digest, "its digest does not lead to it")


def _idempotent(registry: Registry, name: str, url: str | None) -> None:
    """Adding the same again makes no version."""
    first = registry.add(_adapter(1), name)
    _require(registry.add(_adapter(1), name) == first, "there are two versions of one digest")
    _require(len(registry.versions(name)) == 1, "there are two rows")


def _numbers(registry: Registry, name: str, url: str | None) -> None:
    """A version's number is never given twice, not even after it was removed."""
    registry.add(_adapter(1), name)
    second = registry.add(_adapter(2), name)
    registry.remove(second.ref, force=True)
    _require(registry.add(_adapter(3), name).number == 3, "number 2 was given again")


def _compare_and_set(registry: Registry, name: str, url: str | None) -> None:
    """An alias moves only from where it was read, and keeps its history."""
    first, second = registry.add(_adapter(1), name), registry.add(_adapter(2), name)
    registry.set_alias(name, "prod", first, expected=None)
    try:
        registry.set_alias(name, "prod", second, expected=second.digest)
    except AliasConflict:
        pass
    else:
        raise AssertionError("it moved from where it was not")
    registry.set_alias(name, "prod", second, expected=first.digest, reason="conformance")
    _require(registry.resolve(name) == second, "a bare name does not mean prod")
    moves = [(move.previous, move.digest) for move in registry.history(name, "prod")]
    _require(moves == [(None, first.digest), (first.digest, second.digest)], f"the history is {moves}")


def _one_winner(registry: Registry, name: str, url: str | None) -> None:
    """Of many who move one alias at once from the same place, one succeeds."""
    versions = [registry.add(_adapter(seed), name) for seed in range(_WRITERS)]
    start = threading.Barrier(_WRITERS)

    def move(number: int) -> bool:
        with Registry.open(url) as other:
            start.wait()
            try:
                other.set_alias(name, "prod", versions[number], expected=None)
            except AliasConflict:
                return False
            return True

    with ThreadPoolExecutor(_WRITERS) as threads:
        won = sum(threads.map(move, range(_WRITERS)))
    _require(won == 1, f"{won} succeeded")


def _nothing_lost(registry: Registry, name: str, url: str | None) -> None:
    """Of many who add at once, none is lost, and their numbers have no gap."""
    start = threading.Barrier(_WRITERS)

    def add(seed: int) -> int:
        with Registry.open(url) as other:
            start.wait()
            return other.add(_adapter(seed), name).number

    with ThreadPoolExecutor(_WRITERS) as threads:
        numbers = sorted(threads.map(add, range(_WRITERS)))
    _require(numbers == list(range(1, _WRITERS + 1)), f"they got the numbers {numbers}")
    digests = {registry.by_digest(version.digest).digest for version in registry.versions(name)}
    _require(len(digests) == _WRITERS, f"{len(digests)} of {_WRITERS} are there")


def _protected(registry: Registry, name: str, url: str | None) -> None:
    """A protected alias moves by force alone."""
    first, second = registry.add(_adapter(1), name), registry.add(_adapter(2), name)
    registry.set_alias(name, "prod", first)
    registry.protect(name, "prod")
    try:
        registry.set_alias(name, "prod", second)
    except UsageError:
        pass
    else:
        raise AssertionError("it moved")
    registry.set_alias(name, "prod", second, force=True)
    _require(registry.aliases(name)["prod"] == second, "it did not move by force")


def _found(registry: Registry, name: str, url: str | None) -> None:
    """Labels are kept and found."""
    version = registry.add(_adapter(1), name)
    registry.set_labels(version, {"conformance": name})
    _require(registry.search(Search(labels={"conformance": name})) == [version], "the label does not find it")


def _mismatch(registry: Registry, name: str, url: str | None) -> None:
    """That a version was served on another base is noted once, with who allowed it."""
    version, other_base = registry.add(_adapter(1), name), "sha256:" + "1" * 64
    for _ in range(2):
        registry.allow_mismatch(version, other_base)
    noted = [(each.base_id, bool(each.actor)) for each in registry.mismatches(version)]
    _require(noted == [(other_base, True)], f"what is noted is {noted}")


def _removed(registry: Registry, name: str, url: str | None) -> None:
    """What was removed is not found, and its name lists nothing."""
    version = registry.add(_adapter(1), name)
    registry.remove(name, force=True)
    try:
        registry.resolve(version.ref)
    except AdapterNotFound:
        pass
    else:
        raise AssertionError("it is still found")
    _require(registry.names(prefix=name) == [], "its name is still listed")


def _told(registry: Registry, name: str, url: str | None) -> None:
    """Every change is told as an event, once, in order."""
    from flora.registry.journal import Added, Moved, Removed

    version = registry.add(_adapter(1), name)
    registry.set_alias(name, "prod", version)
    registry.remove(name, force=True)
    told = [event.change for event in registry.events() if event.change.name == name]
    kinds = [type(change) for change in told]
    _require(kinds == [Added, Moved, Moved, Moved, Moved, Removed], f"events are {[kind.__name__ for kind in kinds]}")


def _leased(registry: Registry, name: str, url: str | None) -> None:
    """A gc leaves what a running process has a lease of."""
    version = registry.add(_adapter(1), name)
    lease = registry.lease()
    try:
        lease.keep(version)
        registry.remove(name, force=True)
        would_go = registry.gc(dry_run=True, grace_s=0).removed
        _require(version.digest not in would_go, "its manifest would go")
        _require(registry.leased(version.digest) == version, "the holder's other processes do not find it")
    finally:
        lease.close()


def _shared(registry: Registry, name: str, url: str | None) -> None:
    """A large tensor that two versions have is stored once, and each of them comes back when the other one is gone."""
    import torch

    first, second = (registry.add(_adapter(seed, has_table=True), name) for seed in (1, 2))
    _require(registry.shared_bytes(first) == registry.shared_bytes(second) == 1 << 20, "it is stored twice")
    registry.remove(first.ref, force=True)
    exact = registry.load(second).exact
    wanted = _adapter(2, has_table=True).exact
    _require(all(torch.equal(exact[tensor], wanted[tensor]) for tensor in wanted), "the table differs")


PROMISES: tuple[Callable[[Registry, str, str | None], None], ...] = (
    _comes_back,
    _idempotent,
    _numbers,
    _compare_and_set,
    _one_winner,
    _nothing_lost,
    _protected,
    _found,
    _mismatch,
    _removed,
    _told,
    _leased,
    _shared,
)
