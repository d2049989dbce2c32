"""Many measurements in a row: those that are missing, within a time, neighbours on one device made ready once."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec

from flora.bench.bed import Bed
from flora.bench.claims import Rows, measured
from flora.bench.engines import World, give_back_memory, register_adapters
from flora.bench.facts import Surroundings
from flora.bench.row import Row
from flora.bench.serving import config_for, measure_on, measure_storm
from flora.bench.serving_http import Clients, measure_own_server
from flora.bench.settings import WARM_UP_ADAPTERS, ServeBench, Setting
from flora.bench.shapes import write_config
from flora.bench.storm import StormRow
from flora.bench.suites import Entry
from flora.bench.workload import wanted_numbers
from flora.errors import FloraError
from flora.serve.request import AdapterTarget

START_S = 45.0  # until an engine of the 8B shape serves: its own 30, and the registration of its adapters beside it

Tell = Callable[[str], None]
_Targets = dict[str, dict[int, AdapterTarget]]  # by set of adapters


@dataclass(slots=True)
class Outcome:
    """What became of the entries that were asked for and not there yet; filled as they are measured."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, FloraError] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)  # for want of time, or of the measurement that a rate depends on


class SuiteRun:
    """Measures entries in order: `rows` are theirs as they come, `outcome` says at the end what is missing."""

    def __init__(
        self,
        entries: Sequence[Entry],
        before: Rows,
        where: Surroundings,
        *,
        budget_s: float = float("inf"),
        scratch: Path | None = None,
        tell: Tell = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """before    rows that are there: what they have of this commit and GPU is not measured again
        budget_s  no entry begins that would take longer than what is left of it
        """
        self.outcome = Outcome()
        self._entries = [entry for entry in entries if not is_measured(entry, before, where)]
        self._rows: list[Any] = [row for row in before if row.get("gpu") == where.gpu]
        self._where = where
        self._scratch = scratch
        self._tell = tell
        self._clock = clock
        self._end_s = clock() + budget_s

    def rows(self) -> Iterator[Row | StormRow]:
        for _, group in groupby(self._entries, key=_device_of):
            entries = list(group)
            while entries:
                if not self._has_time(START_S + entries[0].seconds) or not self._may_begin(entries):
                    self.outcome.left.append(entries.pop(0).label)
                elif _is_apart(entries[0]):
                    yield from self._measure_apart(entries.pop(0))
                else:
                    yield from self._measure_together(entries)

    def _measure_apart(self, entry: Entry) -> Iterator[Row | StormRow]:
        """What needs an engine or a server of its own."""
        rows: Iterator[Row | StormRow]
        give_back_memory()  # the server is another process
        if entry.storm:
            rows = measure_storm(entry.bench, entry.storm, self._where, scratch=self._scratch, tell=self._tell)
        else:
            clients = Clients(entry.num_clients)
            rows = measure_own_server(entry.bench, clients, self._where, scratch=self._scratch, tell=self._tell)
        yield from self._kept(entry, (msgspec.structs.replace(row, label=entry.label) for row in rows))

    def _measure_together(self, entries: list[Entry]) -> Iterator[Row | StormRow]:
        """Takes entries off the list: all, or up to one that fails, which leaves the device in no known state.

        Where no device can be made ready for them all of them fail: a GPU before Ada has no adapters in fp8.
        """
        with (
            tempfile.TemporaryDirectory(prefix="flora-bench-", dir=self._scratch) as place,
            ThreadPoolExecutor(1) as beside,
        ):
            folder, largest = Path(place), [_largest(entry) for entry in entries]
            write_config(folder / "base", entries[0].bench.setting.shape)
            registered = beside.submit(_register, folder, largest)
            configs = [config_for(World(folder, bench, {}), bench.setting.adapters[0]) for bench in largest]
            try:
                bed = Bed(configs)
            except FloraError as error:
                while entries:
                    self._fail(entries.pop(0), error)
                return
            with bed:
                targets = registered.result()
                num_registered = sum(map(len, targets.values()))
                self._tell(f"{num_registered} adapters registered; engine built in {bed.start_s} s: {bed.stages}")
                while entries:
                    entry = entries.pop(0)
                    bench = self._with_rate(entry)
                    if bench is None or not self._has_time(entry.seconds):
                        self.outcome.left.append(entry.label)
                        continue
                    world = World(folder, bench, targets[_set_of(bench.setting)])
                    rows = measure_on(bed, world, entry.num_adapters, self._where, label=entry.label)
                    yield from self._kept(entry, rows)
                    if entry.label in self.outcome.failed:
                        return

    def _kept(self, entry: Entry, rows: Iterator[Row | StormRow]) -> Iterator[Row | StormRow]:
        started_s = self._clock()
        try:
            for row in rows:
                self._rows.append(msgspec.to_builtins(row))
                yield row
        except FloraError as error:
            self._fail(entry, error)
        else:
            self.outcome.done.append(entry.label)
            self._tell(f"{entry.label} done in {self._clock() - started_s:.0f} s")

    def _fail(self, entry: Entry, error: FloraError) -> None:
        self.outcome.failed[entry.label] = error
        self._tell(f"{entry.label} failed: {told(error)}")

    def _with_rate(self, entry: Entry) -> ServeBench | None:
        """The entry's measurement, its arrivals resolved; None where what they depend on was never measured."""
        if entry.load is None:
            return entry.bench
        reached = measured(self._rows, entry.load.label, "req_s")
        if not reached:
            return None
        rate = round(entry.load.share * reached, 2)
        num_requests = max(2, int(rate * entry.load.duration_s))
        return replace(entry.bench, rate=rate, setting=replace(entry.bench.setting, num_requests=num_requests))

    def _may_begin(self, entries: Sequence[Entry]) -> bool:
        """Whether an engine is worth its start: not where the first entry's rate depends on what was never measured."""
        load = entries[0].load
        return load is None or bool(measured(self._rows, load.label, "req_s"))

    def _has_time(self, seconds: float) -> bool:
        return self._clock() + seconds <= self._end_s


def told(error: FloraError) -> str:
    """What happened and why: the last words of a server that ended are the cause."""
    return f"{error.what}: {error.cause}" if error.cause else error.what


def is_measured(entry: Entry, rows: Rows, where: Surroundings) -> bool:
    """Whether the rows have all of the entry's passes, of this commit and on this kind of GPU."""
    passes = 1 if entry.storm else len(entry.bench.seeds)
    there = [row for row in rows if row.get("label") == entry.label]
    return sum((row.get("commit"), row.get("gpu")) == (where.commit, where.gpu) for row in there) >= passes


def _is_apart(entry: Entry) -> bool:
    return entry.storm is not None or entry.num_clients is not None


def _device_of(entry: Entry) -> tuple[object, ...]:
    """What entries have in common that can share a device."""
    engine = entry.bench.engine
    kind = entry.label if _is_apart(entry) else ""
    built = engine.dtype, engine.adapter_dtype, engine.batch_invariant, engine.beside_rows, engine.max_context
    return kind, entry.bench.setting.shape, *built


def _largest(entry: Entry) -> ServeBench:
    """The entry's measurement, for every adapter that it may ask for: of arrivals the number is not known yet."""
    if entry.load is None:
        return entry.bench
    return replace(entry.bench, beside=entry.num_adapters + WARM_UP_ADAPTERS)


def _set_of(setting: Setting) -> str:
    """A name for the adapters of a setting, the same for settings that can share them."""
    words = [setting.modules, *map(str, setting.ranks), *(["padded"] if setting.is_padded else [])]
    return "-".join(words)


def _register(folder: Path, benches: Sequence[ServeBench]) -> _Targets:
    """All adapters of these measurements."""
    wanted: dict[str, tuple[ServeBench, set[int]]] = {}
    for bench in benches:
        _, numbers = wanted.setdefault(_set_of(bench.setting), (bench, set()))
        numbers |= wanted_numbers(bench, bench.setting.adapters[0])
    return {
        name: register_adapters(folder, bench.setting, numbers, prefix=name)
        for name, (bench, numbers) in wanted.items()
    }
