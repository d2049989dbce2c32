"""Runs each change of a registry once for every point at which it can be cut off, and checks what is left.

    python -m tests.registry.crash_points kill|full|broken FOLDER STRIDE [CHANGE…]

A point is a call that touches the disk: opening, writing out, renaming, making or deleting a file; a statement to the
index; before and after a commit. For every point, or every STRIDE-th, a child process is forked that is killed there
(kill), or that gets ENOSPC or EIO from that call (full, broken). Then the registry must be sound, stand as before the
change or as after it, and a repetition must bring it to where the uninterrupted change does. Prints one JSON line for
each change.
"""

import errno
import fcntl
import json
import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite

from flora.adapter import make_adapter
from flora.errors import AdapterNotFound, StoreError
from flora.identity import BaseRecord, TensorRecord
from flora.registry import Registry, cutting
from tests.registry.adapters import BASE, random_adapter

FIRST, SECOND, THIRD = (random_adapter(seed) for seed in range(3))
cutting.MIN_SHARED_BYTES = 1024  # what is proved here is order, and not what sharing is worth
TABLE = torch.ones(32, 16).bfloat16()
ELDER, YOUNGER = (
    make_adapter(each.factors, BASE, each.header.recipe, exact={"table": TABLE}) for each in (FIRST, SECOND)
)
RECORD = BaseRecord((TensorRecord("w", "BF16", (2, 2), "0" * 64),))


def remove_once(registry: Registry) -> None:
    try:
        registry.remove("sql@v1", force=True)
    except AdapterNotFound:
        assert [version.number for version in registry.versions("sql")] == [2]  # removed the time before


CHANGES: dict[str, Callable[[Registry], Any]] = {
    "add to a new name": lambda registry: registry.add(THIRD, "chat"),
    "add to a known name": lambda registry: registry.add(THIRD, "sql"),
    "add a sibling": lambda registry: registry.add(YOUNGER, "younger"),
    "move an alias": lambda registry: registry.set_alias("sql", "prod", registry.resolve("sql@v2")),
    "remove": remove_once,
    "register a base": lambda registry: registry.register_base(RECORD, name="org/base", path=Path("/base")),
    "collect garbage": lambda registry: registry.gc(grace_s=0),
    "rebuild the index": lambda registry: registry.reindex(),
}
CALLS = [(os, "open"), (os, "fsync"), (os, "replace"), (os, "mkdir"), (os, "unlink"), (fcntl, "flock"),
         (SQLiteDialect_pysqlite, "do_execute"), (SQLiteDialect_pysqlite, "do_commit")]  # fmt: skip
FAULTS = {"full": (errno.ENOSPC, "database or disk is full"), "broken": (errno.EIO, "disk I/O error")}


def prepare(folder: Path) -> None:
    with Registry.open(folder) as registry:
        registry.add(FIRST, "sql")
        registry.add(SECOND, "sql")
        registry.add(ELDER, "elder")
        registry.set_alias("sql", "prod", registry.resolve("sql@v1"))
        registry.remove(registry.add(THIRD, "gone").name)  # something for gc to take


def state(registry: Registry) -> Any:
    """All that a user sees, but for times."""
    names = [(entry.name, entry.version.digest, entry.aliases, entry.num_versions) for entry in registry.names()]
    bases = [(base.base_id, base.name, base.path) for base in registry.bases()]
    moves = {
        (entry.name, alias): [(move.digest, move.previous, move.reason) for move in registry.history(entry.name, alias)]
        for entry in registry.names()
        for alias in ("latest", "prod")
    }
    return names, bases, moves


def cut_off_at(point: int, fault: str) -> Callable[[], bool]:
    """Makes the call number `point` of this process end in the fault; returns what tells whether it came to that."""
    calls = 0

    def strike(is_index: bool) -> None:
        nonlocal calls
        calls += 1
        if calls != point:
            return
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        number, text = FAULTS[fault]
        raise sqlite3.OperationalError(text) if is_index else OSError(number, os.strerror(number))

    def wrap(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            strike(is_index=name.startswith("do_"))
            result = real(*args, **kwargs)
            if name == "do_commit":
                strike(is_index=True)
            return result

        setattr(owner, name, wrapped)

    for owner, name in CALLS:
        wrap(owner, name)
    return lambda: calls >= point


def run_child(folder: Path, change: Callable[[Registry], Any], point: int, fault: str) -> str:
    """How the change ended in a child cut off at `point`: killed, refused (by a StoreError), a traceback, in spite of
    the fault (one that does not matter, such as that of a lock while collecting garbage), or done without coming to it.
    """
    child = os.fork()
    if child == 0:
        code = 3
        try:
            registry = Registry.open(folder)
            was_struck = cut_off_at(point, fault)
            try:
                change(registry)
                code = 2 if was_struck() else 0
            except StoreError:
                code = 1
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "killed"
    return {0: "done", 1: "refused", 2: "in spite"}.get(os.WEXITSTATUS(status), "traceback")


def check_point(folder: Path, change: Callable[[Registry], Any], before: Any, after: Any) -> list[str]:
    """What is wrong with the registry that the child left."""
    wrong = []
    with Registry.open(folder) as registry:
        if harmful := [problem for problem in registry.fsck() if not problem.is_harmless]:
            wrong.append(f"not sound: {harmful}")
        if state(registry) not in (before, after):
            wrong.append(f"neither before nor after: {state(registry)}")
        change(registry)
        if state(registry) != after:
            wrong.append(f"repeating it does not converge: {state(registry)}")
        registry.gc(grace_s=0)
        if problems := registry.fsck():
            wrong.append(f"gc leaves: {problems}")
        if num_bytes := registry.gc(dry_run=True).num_shared_bytes:
            wrong.append(f"gc leaves {num_bytes} bytes that are stored twice")
        for entry in registry.names():
            registry.load(entry.version)
    return wrong


def run_change(
    template: Path, folder: Path, change: Callable[[Registry], Any], fault: str, stride: int
) -> dict[str, Any]:
    with Registry.open(template) as registry:
        before = state(registry)
    shutil.copytree(template, folder)
    with Registry.open(folder) as registry:
        change(registry)
        after = state(registry)
    endings: dict[str, int] = {}
    violations = []
    for point in range(1, 10_000, stride):
        shutil.rmtree(folder)
        shutil.copytree(template, folder)
        ending = run_child(folder, change, point, fault)
        endings[ending] = endings.get(ending, 0) + 1
        violations += [f"point {point} ({ending}): {wrong}" for wrong in check_point(folder, change, before, after)]
        if ending == "done":
            break
    shutil.rmtree(folder)
    return {"endings": endings, "violations": violations}


def main(fault: str, root: Path, stride: int, *names: str) -> None:
    torch.set_num_threads(1)
    prepare(root / "template")
    for name in names or CHANGES:
        every = stride * 2 if name == "add a sibling" and stride > 1 else stride  # it has most of all points
        result = run_change(root / "template", root / "work", CHANGES[name], fault, every)
        print(json.dumps({"change": name, **result}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
