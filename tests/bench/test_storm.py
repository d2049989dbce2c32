"""Loads beside streams, on the real engine; time passes by a millisecond whenever someone looks."""

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from flora.bench.engines import World, make_world, running_engine
from flora.bench.serving import check_nothing_leaks
from flora.bench.settings import ServeBench, Setting
from flora.bench.storm import Storm, drive_storm
from flora.cli import main
from flora.errors import CheckFailed
from flora.serve.config import EngineConfig
from flora.serve.engine import Engine
from flora.serve.messages import LoadAdapter
from tests.bench.clocks import SteppingClock

TINY = Setting("tiny", "attention", ranks=(8, 4), adapters=(2,))
ENGINE = EngineConfig(base=Path(), registry="", cache_dir=Path(), pool_bytes=32 << 20, max_context=2048, num_threads=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("storm"), ServeBench(setting=TINY, engine=ENGINE), range(8))


@pytest.fixture
def engine(world: World) -> Iterator[Engine]:
    with running_engine(world.config(range(8))) as engine:
        yield engine


def test_newcomers_come_at_their_rate_after_as_long_a_peace(world, engine):
    storm = Storm(rate=20.0, num_streams=3, window_s=0.3)
    streams, newcomers = ([world.targets[i] for i in numbers] for numbers in (range(2), range(2, 8)))

    weather = drive_storm(engine, storm, streams, newcomers, SteppingClock())

    resident = {adapter.label for adapter in engine.heartbeat().resident}
    assert storm.num_loads == 6
    assert resident == {world.targets[i].label for i in range(8)}  # the streams' two, and six that were loaded
    assert len(weather.load_ms) <= 6
    # a gap of each stream for each step; a step takes the clock's two looks, the storm's one more to say who is due
    assert len(weather.gaps_before_s) == pytest.approx(3 * 300 / 2, abs=6)
    assert len(weather.gaps_during_s) == pytest.approx(3 * 300 / 3, abs=6)
    assert check_nothing_leaks(engine) == 0


def test_every_load_that_is_answered_in_time_is_counted(world, engine):
    """What is resident already is answered at once, so how fast this machine reads does not matter."""
    storm = Storm(rate=20.0, num_streams=1, window_s=0.3)
    newcomers = [world.targets[i] for i in range(6)]
    for target in newcomers:
        engine.load_adapter(LoadAdapter(request_id=target.label, adapter=target))
    while not engine.is_idle:
        engine.step(wait_s=1.0)

    weather = drive_storm(engine, storm, [], newcomers, SteppingClock())

    assert len(weather.load_ms) == storm.num_loads == 6


def test_streams_that_end_before_the_storm_are_no_measurement(world):
    config = msgspec.structs.replace(world.config(range(8)), max_context=64)
    with running_engine(config) as engine, pytest.raises(CheckFailed, match="ended before the storm"):
        drive_storm(engine, Storm(rate=1.0, num_streams=1, window_s=9.0), [], [world.targets[2]] * 9, SteppingClock())


def test_a_load_that_is_refused_is_no_measurement(world, engine):
    missing = msgspec.structs.replace(world.targets[2], serving_digest="sha256:" + "0" * 64, version_digest="gone")

    with pytest.raises(CheckFailed, match="refused"):
        drive_storm(engine, Storm(rate=10.0, num_streams=1, window_s=0.5), [], [missing] * 5, SteppingClock())


def test_a_storm_is_a_row_of_its_own_kind(tmp_path, capfd):
    words = ["--shape", "tiny", "--device", "cpu", "--adapters", "2", "--pool", "32MiB", "--threads", "1"]
    storm = ["--storm", "10", "--streams", "2", "--storm-seconds", "0.5", "--out", str(tmp_path / "rows"), "--json"]

    code = main(["bench", "serve", *words, *storm])

    [row] = json.loads(capfd.readouterr().out)["rows"]
    assert code == 0
    assert json.loads((tmp_path / "rows").read_text()) == row
    assert (row["streams"], row["storm"], row["window_s"]) == (2, 10.0, 0.5)
    assert row["loads"] <= 5
    assert (row["load_ms_p99"] is None) == (row["loads"] == 0)
    assert row["gap_p99_ratio"] == pytest.approx(row["gap_ms_p99_during"] / row["gap_ms_p99_before"], rel=0.01)


def test_clients_of_a_server_feel_a_storm_too(capfd):
    words = ["--shape", "tiny", "--device", "cpu", "--adapters", "1", "--pool", "32MiB", "--threads", "1", "--http"]

    code = main(["bench", "serve", *words, "--storm", "6", "--streams", "2", "--storm-seconds", "0.5", "--json"])

    said = capfd.readouterr()
    assert code == 0, said.err
    [row] = json.loads(said.out)["rows"]
    assert (row["system"], row["streams"]) == ("flora-http", 2)
    assert row["loads"] <= 3
    assert row["gap_ms_p99_before"] > 0


def test_a_server_of_others_has_no_adapters_to_storm_with(capfd):
    assert main(["bench", "serve", "--storm", "6", "--url", "http://127.0.0.1:1", "--device", "cpu"]) == 2
    assert "--storm" in capfd.readouterr().err
