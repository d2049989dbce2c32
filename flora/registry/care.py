"""Care of a whole registry: what gc, fsck and reindex do, in which order, and which locks they hold meanwhile."""

from flora.registry import index
from flora.registry.check import check, snapshot
from flora.registry.collect import collect
from flora.registry.home import Home
from flora.registry.leases import leased_blobs
from flora.registry.rebuild import RebuildReport, rebuild
from flora.registry.records import GcReport, Problem
from flora.registry.sharing import share_all


def gc(home: Home, *, dry_run: bool, grace_s: float) -> GcReport:
    """Shares what is still stored twice, then takes what no row, no lease and no writer of late may need."""
    num_shared_bytes = share_all(home, dry_run=dry_run)
    with home.writing() as connection:  # the lock keeps writers from naming what is being taken
        leased = leased_blobs(home.root, home.store, grace_s=grace_s, take=not dry_run)
        return collect(
            connection, home.store, dry_run=dry_run, grace_s=grace_s, leased=leased, num_shared_bytes=num_shared_bytes
        )


def fsck(home: Home) -> list[Problem]:
    """Every problem but those of versions that were removed meanwhile."""
    with home.reading() as connection:  # not while weights are read: it would make writers wait
        before = snapshot(connection, home.journal)
    problems = check(before, home.store, home.journal)
    with home.reading() as connection:
        gone = {version.ref for version in before.versions} - {v.ref for v in index.every_version(connection)}
    return [problem for problem in problems if problem.subject not in gone]


def reindex(home: Home) -> RebuildReport:
    with home.writing() as connection:
        return rebuild(connection, home.store, home.journal)
