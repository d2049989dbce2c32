"""Several processes that write to one registry, which does not exist yet, at once.

    python -m tests.registry.writers FOLDER

Four forked writers add ten adapters each, half of them under one name that all share, and move an alias of it by
compare-and-set; a fifth process collects garbage without any grace time all the while. Each adapter has one of three
tables, which are stored once for all that have it. Every writer notes what it was told. Prints one JSON line: what was
told, and what is wrong with the registry afterwards.
"""

import json
import os
import sys
import traceback
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from flora.adapter import Adapter, make_adapter
from flora.errors import AliasConflict
from flora.registry import Registry, cutting
from tests.registry.adapters import BASE, random_adapter

WRITERS, ADDS = 4, 10
cutting.MIN_SHARED_BYTES = 1024  # of a table, and of no factor


def adapter_with_table(seed: int) -> Adapter:
    own = random_adapter(seed)
    table = torch.full((32, 16), float(seed % 3)).bfloat16()
    return make_adapter(own.factors, BASE, own.header.recipe, exact={"table": table})


def write(folder: Path, writer: int, told: Path) -> None:
    with Registry.open(folder) as registry, told.open("w") as notes:
        for i in range(ADDS):
            name = "shared" if i % 2 else f"own-{writer}"
            version = registry.add(adapter_with_table(100 * writer + i), name)
            notes.write(json.dumps([version.ref, version.digest]) + "\n")
            while name == "shared":
                current = registry.aliases("shared").get("prod")
                try:
                    registry.set_alias("shared", "prod", version, expected=current.digest if current else None)
                    break
                except AliasConflict:
                    continue


def collect(folder: Path, done: Path) -> None:
    with Registry.open(folder) as registry:
        while not done.exists():
            registry.gc(grace_s=0)


def fork(function: Any, *arguments: Any) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function(*arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def main(root: Path) -> None:
    torch.set_num_threads(1)
    folder, done = root / "registry", root / "done"
    collector = fork(collect, folder, done)
    writers = [fork(write, folder, writer, root / f"told-{writer}") for writer in range(WRITERS)]
    failed = sum(os.waitpid(writer, 0)[1] != 0 for writer in writers)
    done.touch()
    failed += os.waitpid(collector, 0)[1] != 0

    told = [json.loads(line) for file in sorted(root.glob("told-*")) for line in file.read_text().splitlines()]
    with Registry.open(folder) as registry:
        lost = [ref for ref, digest in told if registry.resolve(ref).digest != digest]
        for ref, _ in told:
            registry.load(registry.resolve(ref))
        moves = registry.history("shared", "prod")
        result = {
            "failed": failed,
            "told": len(told),
            "lost": lost,
            "problems": [str(problem) for problem in registry.fsck() if not problem.is_harmless],
            "shared": [version.number for version in registry.versions("shared")],
            "moves": len(moves),
            "chain": all(move.previous == before.digest for before, move in pairwise(moves)),
            "names": [entry.name for entry in registry.names()],
        }
        listing = registry.names()
        registry.reindex()
        registry.gc(grace_s=0)
        result["stored_twice"] = registry.gc(dry_run=True).num_shared_bytes
        result["in_parts"] = len(list(folder.rglob("*.parts")))
        result["rebuilt"] = registry.names() == listing and registry.history("shared", "prod") == moves
    print(json.dumps(result))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
