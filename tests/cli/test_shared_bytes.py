"""Sizes that commands print, where adapters have large tensors in common."""

import torch

from flora.adapter import make_adapter
from flora.registry import Registry
from tests.cli.conftest import Flora
from tests.registry.adapters import BASE, random_adapter

TABLE = torch.ones(1024, 512).bfloat16()  # 1 MiB


def test_show_says_how_much_is_stored_once_and_gc_counts_what_goes(flora: Flora, home):
    with Registry.open(home / "registry") as registry:
        for seed, name in enumerate(["first", "second", "apart"]):
            own = random_adapter(seed)
            exact = {"table": TABLE if name != "apart" else -TABLE}
            registry.add(make_adapter(own.factors, BASE, own.header.recipe, exact=exact), name)

    shown = flora("show", "first", "--json").json
    assert shown["shared_bytes"] == 1 << 20
    assert shown["num_bytes"] > 1 << 20  # the whole adapter, as it is pushed and exported
    assert flora("show", "apart", "--json").json["shared_bytes"] == 0

    flora("rm", "first")
    freed = flora("gc", "--dry-run", "--grace", "0", "--json").json
    assert 0 < freed["num_bytes"] < 1 << 16
    assert freed["num_shared_bytes"] == 0
    assert flora("gc", "--grace", "0", "--json").json["num_bytes"] == freed["num_bytes"]
    flora("rm", "second")
    assert flora("gc", "--grace", "0", "--json").json["num_bytes"] > 1 << 20
    assert flora("fsck").code == 0
