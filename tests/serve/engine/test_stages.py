"""A start takes seconds, and a machine's first start on a GPU minutes: whoever waits reads what for."""

import logging
import re

import pytest

from flora.serve.engine.stages import Stages


def test_a_start_says_what_it_waits_for_and_how_long_that_took(world, caplog):
    with caplog.at_level(logging.INFO, logger="flora.serve.engine"):
        world.engine(host_cache_bytes=1 << 30).close()

    base, memory, steps, built = (record.getMessage() for record in caplog.records)
    assert base == f"reading the base {world.base}"
    assert memory == "1.0 GiB of host memory for adapters"
    assert steps == "making ready for steps"
    assert re.fullmatch(r"engine built: base \d+\.\d s, loaders \d+\.\d s, steps \d+\.\d s", built)


def test_a_part_that_fails_is_not_counted():
    stages = Stages()

    with pytest.raises(OSError, match="gone"), stages.begin("base", "reading the base"):
        raise OSError("gone")

    assert stages.seconds == {}
