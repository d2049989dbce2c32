"""The fine-tunes that are studied: a base, a full fine-tune of it, and questions that neither was trained on."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from judge import Example


@dataclass(frozen=True, slots=True)
class Pair:
    task: str
    base: Path
    tuned: Path
    examples: Sequence[Example]  # of the test side


def kit_pair(task: str, work: Path, questions: int | None) -> Pair:
    """The kit's base and its fine-tune on `task`, kept under `work`. FLORA_FIXTURES names the kit."""
    kit = kit_folder()
    from tasks import TASKS

    base = made(kit, work / "base", "make_base.py", work / "base")
    tuned = made(kit, work / task, "make_tuned.py", task, base, work / task)
    return Pair(task, base, tuned, TASKS[task].split().test[:questions])


def own_pair(task: str, base: Path, tuned: Path, questions: int | None) -> Pair:
    """Two folders, and a task of `made_tasks.py`: what `finetune.py` makes of a base."""
    from made_tasks import TASKS

    return Pair(task, base, tuned, TASKS[task].test(questions or 2000))


def kit_folder() -> Path:
    """The folder that FLORA_FIXTURES names, and its modules at hand."""
    kit = Path(os.environ["FLORA_FIXTURES"])
    if str(kit) not in sys.path:
        sys.path.append(str(kit))
    return kit


def made(kit: Path, folder: Path, script: str, *args: object) -> Path:
    """`folder`, by the kit's `script` unless it is there already."""
    if not folder.exists():
        subprocess.run([sys.executable, kit / script, *map(str, args)], check=True, stdout=subprocess.DEVNULL)
    return folder


def commit() -> str:
    """Of this code: FLORA_COMMIT, where there is no git."""
    if named := os.environ.get("FLORA_COMMIT"):
        return named
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
