"""Interrupted runs: killed at chosen moments, in processes of their own, and resumed to the very same adapter."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flora.checkpoint import Checkpoint, open_checkpoint
from flora.errors import CheckFailed, NotFinite
from flora.extract import ExtractConfig, Wish, extract, extract_many, plan_extraction
from flora.extract.change import Change, PairWorker
from flora.extract.journal import Journal
from flora.rank import RankRule
from tests.extract.models import build, rewrite, save, tune

KILLED = """
import os, signal, sys
from pathlib import Path
from threading import Lock
import torch
from flora.checkpoint import open_checkpoint
from flora.extract import ExtractConfig, extract
from flora.rank import RankRule

base, tuned, folder, left = *map(Path, sys.argv[1:4]), int(sys.argv[5])
torch.set_num_threads(1)

def die_at_last(*_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

progress, rename, one_at_a_time = die_at_last, os.replace, Lock()

def replace(old, new):
    with one_at_a_time:  # else another worker's record, counted before, may not be in its place at the end
        die_at_last()
        rename(old, new)

if sys.argv[4] == "mid-write":  # a record is written, and not yet in its place
    progress, os.replace = None, replace
extract(
    open_checkpoint(base), open_checkpoint(tuned), ExtractConfig(RankRule(max_rank=4), journal_dir=folder), progress
)
"""
NUM_DONE = 18  # pairs that the killed run of `journal` was told about


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the pairs that are worked out, not found on record, from here on."""
    names: list[str] = []
    work = PairWorker.__call__

    def counted(self, pair):
        names.append(pair.name)
        return work(self, pair)

    monkeypatch.setattr(PairWorker, "__call__", counted)
    return names


def config_with(folder: Path, **options) -> ExtractConfig:
    return ExtractConfig(**{"rule": RankRule(max_rank=4), "journal_dir": folder} | options)


def kill_a_run(pair: tuple[Checkpoint, Checkpoint], folder: Path, moment: str, count: int) -> None:
    words = [str(one.path) for one in pair] + [str(folder), moment, str(count)]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def killed(pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    kill_a_run(pair, folder, "between pairs", NUM_DONE)
    return folder


@pytest.fixture
def journal(killed: Path, tmp_path: Path) -> Path:
    """The journal folder of a run on `pair` that was killed after 18 pairs of 20."""
    return shutil.copytree(killed, tmp_path / "journal")


@pytest.mark.parametrize(("moment", "count"), [("between pairs", 1), ("mid-write", 6)])
def test_a_killed_run_goes_on_and_ends_at_the_same_adapter(pair, tmp_path, worked, moment, count):
    kill_a_run(pair, tmp_path, moment, count)

    resumed = extract(*pair, config_with(tmp_path, resume=True))

    num_tensors = len(resumed.plan.pairs)
    assert resumed.journal.num_resumed + len(worked) == num_tensors
    if moment == "mid-write":
        assert resumed.journal.num_resumed == count - 1  # all but the fatal one
    else:
        assert resumed.journal.num_resumed >= count  # all that was told, and what the workers had done beyond
    uninterrupted = extract(*pair, config_with(None))
    assert resumed.adapter.header == uninterrupted.adapter.header
    assert resumed.adapter.report == uninterrupted.adapter.report


def test_without_resume_a_run_starts_afresh(pair, journal, worked):
    assert extract(*pair, config_with(journal)).journal.num_resumed == 0
    assert len(worked) == len(pair[0].tensors)


@pytest.mark.parametrize("other", [{"rule": RankRule(max_rank=3)}, {"seed": 1}, {"factor_dtype": "float32"}])
def test_a_run_with_other_options_takes_nothing_over(pair, journal, other):
    assert extract(*pair, config_with(journal, resume=True, **other)).journal.num_resumed == 0


def test_a_run_on_changed_files_takes_nothing_over(tmp_path):
    model = build("llama")
    base, tuned = save(model, tmp_path / "base"), save(tune(model), tmp_path / "tuned")
    extract(base, tuned, config_with(tmp_path / "journal")).journal.release()
    changed = rewrite(tuned, lambda tensors: tensors["model.norm.weight"].add_(1))

    assert extract(base, changed, config_with(tmp_path / "journal", resume=True)).journal.num_resumed == 0


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_run_with_another_config_beside_the_files_takes_nothing_over(tmp_path, side):
    """By `model_type` a weight is a linear layer's or a Conv1D's: half of an adapter was of each reading."""
    model = build("llama")
    sides = {"base": save(model, tmp_path / "base"), "tuned": save(tune(model), tmp_path / "tuned")}
    (tmp_path / side / "config.json").rename(tmp_path / "config.json")
    early = {name: open_checkpoint(one.path) for name, one in sides.items()}
    extract(*early.values(), config_with(tmp_path / "journal")).journal.release()

    assert extract(*early.values(), config_with(tmp_path / "journal", resume=True)).journal.num_resumed > 0
    assert extract(*sides.values(), config_with(tmp_path / "journal", resume=True)).journal.num_resumed == 0


@pytest.mark.parametrize("other", [{"kind": "conv1d"}, {"status": "exact"}])
def test_a_record_of_a_pair_that_was_taken_for_another_kind_is_worked_out_again(pair, journal, other):
    plan = plan_extraction(*pair, config_with(journal))
    one = plan.extractable[0]
    kept = Journal.open(*pair, config_with(journal, resume=True), plan)
    kept.save(Change(one))

    assert kept.load(Change(one)) is not None
    assert kept.load(Change(replace(one, **other))) is None
    kept.release()


@pytest.mark.parametrize("damage", ["cut", "flip", "swap"])
def test_a_record_that_is_not_sound_is_worked_out_again(pair, journal, damage):
    first, second, *_ = sorted(journal.glob("*/*.safetensors"), key=lambda path: -path.stat().st_size)
    data = bytearray(first.read_bytes())
    if damage == "swap":
        data = bytearray(second.read_bytes())
    data[-1] ^= 1 if damage == "flip" else 0
    first.write_bytes(data[:-7] if damage == "cut" else data)

    resumed = extract(*pair, config_with(journal, resume=True))

    assert NUM_DONE - 1 <= resumed.journal.num_resumed < len(resumed.plan.pairs)
    assert resumed.adapter.header == extract(*pair, config_with(None)).adapter.header


def test_everything_that_an_adapter_carries_survives_the_journal(tmp_path):
    model = build("qwen2")  # in float32, so that its norms and biases change
    pair = save(model, tmp_path / "base"), save(tune(model), tmp_path / "tuned")
    options = {"wish": Wish(embeddings=True, vectors=True), "rule": RankRule(budget_bytes=30_000)}
    first = extract(*pair, config_with(tmp_path / "journal", **options))
    first.journal.release()  # as if its process had ended before the adapter was stored

    again = extract(*pair, config_with(tmp_path / "journal", resume=True, **options))

    assert again.journal.num_resumed == len(first.plan.pairs)
    assert again.adapter.header == first.adapter.header
    assert again.adapter.report == first.adapter.report
    assert len(again.adapter.header.exact_tensors) == 11


def test_a_journal_is_gone_once_the_adapter_is_stored(pair, tmp_path):
    extract(*pair, config_with(tmp_path)).journal.discard()

    assert list(tmp_path.iterdir()) == []


def test_two_runs_of_the_same_do_not_share_a_journal(pair, tmp_path):
    first = extract(*pair, config_with(tmp_path))

    second = extract(*pair, config_with(tmp_path, resume=True))

    assert second.journal is None  # the first one still holds it
    assert second.adapter.header == first.adapter.header


def test_old_journals_are_swept(pair, journal):
    (old,) = journal.iterdir()
    os.utime(old, (1, 1))

    extract(*pair, config_with(journal, seed=5)).journal.discard()

    assert not old.exists()


def test_a_folder_that_cannot_be_written_costs_the_journal_and_not_the_run(pair, tmp_path):
    (tmp_path / "file").write_text("")

    assert extract(*pair, config_with(tmp_path / "file")).journal is None


def test_strict_leaves_the_journal_for_a_run_that_is_not(pair, tmp_path):
    options = {"rule": RankRule(energy=0.999999, max_rank=2)}
    with pytest.raises(CheckFailed):
        extract(*pair, config_with(tmp_path, strict=True, **options))

    again = extract(*pair, config_with(tmp_path, resume=True, **options))

    assert again.journal.num_resumed == len(again.plan.pairs)


def test_several_fine_tunes_take_turns_on_each_tensor_of_the_base(pair, tmp_path, monkeypatch):
    """One worker: the order in which the base's tensors are read is then the order of the work."""
    base, tuned = pair
    other = save(tune(build("llama"), seed=2), tmp_path / "other", torch.bfloat16)
    monkeypatch.setattr("flora.extract.plan.choose_crew", lambda *_, **__: one_worker())
    read: list[str] = []
    spied = SpiedCheckpoint(base, read)

    both = extract_many(spied, [tuned, other], config_with(None))

    assert read == sorted(read)  # all that is asked of a tensor is asked at once
    assert len(read) > len(set(read))
    alone = [extract(base, one, config_with(None)) for one in (tuned, other)]
    assert [one.adapter.header for one in both] == [one.adapter.header for one in alone]


def test_one_checkpoint_that_is_broken_does_not_stop_the_others(pair, tmp_path):
    base, tuned = pair
    bad = save(tune(build("llama"), seed=3), tmp_path / "bad", torch.bfloat16)

    def spoil(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")

    first, second, third = extract_many(base, [tuned, rewrite(bad, spoil), tuned], config_with(None))

    assert isinstance(second, NotFinite)
    assert first.adapter.header == third.adapter.header == extract(base, tuned, config_with(None)).adapter.header


def one_worker():
    from flora.extract.workers import Crew

    return Crew(1, 1)


class SpiedCheckpoint(Checkpoint):
    """Tells which tensors are read, each time they are."""

    def __init__(self, original: Checkpoint, read: list[str]) -> None:
        super().__init__(original.path, original.config, original.tensors)
        object.__setattr__(self, "_read", read)

    def load(self, name: str) -> torch.Tensor:
        self._read.append(name)
        return super().load(name)


def test_a_resumed_run_knows_what_float32_took_from_a_float64_norm(tmp_path):
    norm = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = build("llama")
    base = rewrite(save(model, tmp_path / "base"), lambda tensors: tensors.update({"model.norm.weight": norm}))
    nudged = {"model.norm.weight": norm + 1e-9}  # less than float32 can tell
    tuned = rewrite(save(tune(model), tmp_path / "tuned"), lambda tensors: tensors.update(nudged))
    config = config_with(tmp_path / "journal", wish=Wish(vectors=True))

    first = extract(base, tuned, config)
    first.journal.release()
    resumed = extract(base, tuned, replace(config, resume=True))

    assert resumed.journal.num_resumed == len(first.adapter.report.tensors)
    assert resumed.adapter.report == first.adapter.report
    assert first.adapter.report.by_name()["model.norm.weight"].kept < 0
