"""Extraction as the command line does it: open the pair, refuse early, extract with a progress bar, store."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from flora.cli.output import note
from flora.cli.progress import progress
from flora.cli.sizes import show_bytes
from flora.errors import FloraError, NameInvalid, UsageError
from flora.names import check_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from flora.adapter import Adapter
    from flora.checkpoint import Checkpoint
    from flora.extract import ExtractConfig, ExtractProgress, ExtractResult
    from flora.identity import BaseRecord
    from flora.registry import Registry, Version


@dataclass(frozen=True, slots=True)
class Target:
    """Where one adapter comes from and goes to."""

    source: str
    name: str | None  # in the registry; None: not there
    out: Path | None

    @classmethod
    def of(cls, source: str, name: str | None, out: Path | None) -> Target:
        if name is not None:
            check_name(name)
        return cls(source, name or (None if out else default_name(source)), out)


def default_name(source: str) -> str:
    """The last part of a folder or Hub id as a registry name. Raises NameInvalid if nothing is left of it."""
    last = Path(source).expanduser().resolve().name if Path(source).expanduser().exists() else source.rpartition("/")[2]
    name = re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9_]+$", "", re.sub(r"\.{2,}|[^A-Za-z0-9._-]+", "-", last)[:64])
    try:
        return check_name(name)
    except NameInvalid as error:
        raise NameInvalid(f"{source!r} gives no name for the registry", fix="choose one with --name") from error


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """One extraction, done and stored."""

    result: ExtractResult
    version: Version | None  # in the registry
    out: Path | None
    tuned_bytes: int
    write_s: float  # storing it took

    @property
    def adapter(self) -> Adapter:
        return self.result.adapter

    @property
    def id(self) -> str:
        return self.version.ref if self.version else str(self.out)

    @property
    def num_resumed(self) -> int:
        """Tensors that an interrupted run had done already."""
        return self.result.journal.num_resumed if self.result.journal else 0

    @property
    def adapter_bytes(self) -> int:
        """Of the stored weights."""
        if self.version is not None:
            return self.version.num_bytes
        whole = sum(tensor.nbytes for tensor in self.adapter.exact.values())
        return whole + sum(factors.num_bytes for factors in self.adapter.factors.values())

    @property
    def num_workers(self) -> int:
        """Tensors that were in work at a time."""
        return self.result.plan.crew.num_workers

    @property
    def seconds(self) -> dict[str, float]:
        """As ExtractResult.timings has them, and `write`, which is no part of their total."""
        return {**self.result.timings, "write": self.write_s}

    def record(self) -> dict[str, Any]:
        """Everything, as plain values."""
        from flora.adapter import to_json
        from flora.cli.verdict import advice, left_out, verdict
        from flora.diagnosis import diagnose_report, noise_share

        header, report = self.adapter.header, self.adapter.report
        assert report is not None
        return {
            "id": self.id,
            "ref": self.version.ref if self.version else None,
            "digest": self.version.digest if self.version else None,
            "serving_digest": str(header.serving_digest),
            "out": str(self.out) if self.out else None,
            "base": header.base.name,
            "base_id": header.base.base_id,
            "num_modules": len(header.modules),
            "max_rank": header.max_rank,
            "num_bytes": self.adapter_bytes,
            "checkpoint_bytes": self.tuned_bytes,
            "kept_share_of_modules": report.extracted_share,
            "kept_share": report.kept_share,
            "left_out": [
                {"kind": group.kind, "count": group.count, "share": group.share} for group in left_out(report)
            ],
            "noise_share": noise_share(report),
            "kind": diagnose_report(report),
            "verdict": verdict(report),
            "advice": list(advice(report)),
            "seconds": self.seconds,
            "num_workers": self.num_workers,
            "peak_device_bytes": self.result.peak_device_bytes,
            "num_resumed": self.num_resumed,
            "tensors": to_json(report)["tensors"],
        }


def extract_one(
    base_source: str,
    target: Target,
    config: ExtractConfig,
    registry_url: str | None,
    *,
    is_quiet: bool = False,
    allow_pickle: bool = False,
) -> Outcome:
    """Extracts one pair and stores the adapter where `target` says. What can be refused early is."""
    with readable([base_source, target.source], allow_pickle=allow_pickle) as (base, tuned):
        (found,) = extract_all(base, [tuned], [target], config, registry_url, is_quiet=is_quiet)
    if isinstance(found, FloraError):
        raise found
    return found


def extract_all(
    base: Checkpoint,
    tuned: Sequence[Checkpoint],
    targets: Sequence[Target],
    config: ExtractConfig,
    registry_url: str | None,
    *,
    records: Callable[[], Sequence[BaseRecord]] | None = None,
    is_quiet: bool = False,
    can_resume: bool = False,
) -> list[Outcome | FloraError]:
    """Extracts several fine-tunes of one base, which is read once, and stores each adapter where its target says.

    What is wrong with one fine-tune's weights stands in its place. What headers and names can show is raised before
    any weight is read.

    records     see extract_many
    can_resume  who interrupts the work may go on later, and is told how
    """
    from flora.extract import extract_many

    registries = [_open_target(target, base, config, registry_url) for target in targets]
    title = f"extracting {tuned[0].path.name}" + (f" and {len(tuned) - 1} more" if len(tuned) > 1 else "")
    num_done = 0  # tensors, each on record

    def tell(done: ExtractProgress) -> None:
        nonlocal num_done
        num_done += 1
        report(done.done_bytes / max(1, done.total_bytes), _detail(done))

    try:
        with progress(title, is_quiet=is_quiet) as report:
            found = extract_many(base, tuned, config, tell, records)
        return [
            result if isinstance(result, FloraError) else _store(result, base, one, target, registry)
            for result, one, target, registry in zip(found, tuned, targets, registries, strict=True)
        ]
    except KeyboardInterrupt:
        if can_resume and num_done:
            note(f"{num_done} tensors are done: the same command with --resume goes on from there")
        raise


def _store(
    result: ExtractResult, base: Checkpoint, tuned: Checkpoint, target: Target, registry: Registry | None
) -> Outcome:
    start, version = time.perf_counter(), None
    if registry is not None and target.name is not None:
        with registry:
            version = registry.add(result.adapter, target.name, provenance={"command": "extract"})
            registry.register_base(result.base_record, name=base.name, path=base.path)
    if target.out is not None:
        from flora.registry.formats.paths import tree_paths
        from flora.registry.formats.peft import save_peft

        save_peft(result.adapter, target.out, paths=tree_paths(base.path, result.adapter.header))
    if result.journal is not None:
        result.journal.discard()  # only now is nothing of it needed any more
    return Outcome(result, version, target.out, tuned.num_bytes, time.perf_counter() - start)


@contextmanager
def readable(sources: Sequence[str], *, allow_pickle: bool) -> Iterator[list[Checkpoint]]:
    """The checkpoints, open; pickled ones as temporary copies, if they may be."""
    from flora.checkpoint import locate_checkpoint, open_checkpoint
    from flora.errors import PickleRefused

    def opened(source: str, parent: Path) -> Checkpoint:
        folder = locate_checkpoint(source)
        if folder.suffix == ".gguf":
            from flora.extract.gguf import open_gguf

            return open_gguf(folder)
        try:
            return open_checkpoint(folder)
        except PickleRefused:
            if not allow_pickle:
                raise
        from flora.unpickle import convert_pickles

        return open_checkpoint(convert_pickles(folder, parent))

    with TemporaryDirectory(prefix="flora-unpickled-") as folder:
        yield [opened(source, Path(folder) / str(place)) for place, source in enumerate(sources)]


def _open_target(target: Target, base: Checkpoint, config: ExtractConfig, registry_url: str | None) -> Registry | None:
    """The registry, if the adapter goes there, after refusing what would be refused once the work is done."""
    if target.out is not None:
        from flora.registry.formats.peft import check_replaceable

        check_replaceable(target.out)
    if target.name is None:
        return None
    from flora.registry import Registry

    registry = Registry.open(registry_url)
    _check_name_is_free(registry, target.name, base, config)
    return registry


def _check_name_is_free(registry: Registry, name: str, base: Checkpoint, config: ExtractConfig) -> None:
    """Raises UsageError if the name belongs to another base. Hashes the base only where the name exists already."""
    from flora.errors import AdapterNotFound
    from flora.identity import base_record

    try:
        known = registry.versions(name)
    except AdapterNotFound:
        return
    base_id = str(base_record(base, config.cache_dir).base_id)
    other = next((version for version in known if version.base_id not in (None, base_id)), None)
    if other is not None:
        raise UsageError(
            f"the name {name} belongs to adapters of another base, {other.base_name}",
            cause=f"{other.ref} has base {other.base_id}; {base.path} is {base_id}",
            fix="choose another name with --name",
        )


def _detail(done: ExtractProgress) -> str:
    return f"{done.done_modules}/{done.total_modules} modules, {show_bytes(done.done_bytes)}"


def journal_dir() -> Path:
    from flora.config import settings

    return settings().cache_dir / "unfinished"


def hash_cache_dir() -> Path:
    from flora.config import settings

    return settings().cache_dir / "hashes"
