"""Random adapters into a registry, by as many processes as there are different weights to draw."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from flora.adapter import BaseBinding, Recipe, make_adapter
from flora.bench.shapes import FILES_PER_RANK, MODULE_SETS, random_factors
from flora.identity import BaseRecord
from flora.lowrank import pad
from flora.registry import Registry
from flora.serve.request import AdapterTarget


def register_random_adapters(
    registry: Path,
    shape: str,
    modules: str,
    ranks: Sequence[int],
    indices: Iterable[int],
    num_processes: int,
    padded_rank: int | None = None,
    prefix: str | None = None,
) -> dict[int, AdapterTarget]:
    """Adapter number i has rank ranks[i % len(ranks)]; numbers that share weights differ by their salt alone.

    prefix         of their names, before the number; None: the set of modules
    num_processes  1: this one, which is quicker where the weights are small
    padded_rank    what every adapter is filled up to with zeros; None: it stays as it is
    """
    Registry.open(registry).close()  # made once, before many open it
    shares: dict[tuple[int, int], list[int]] = {}
    for i in sorted(set(indices)):
        shares.setdefault((ranks[i % len(ranks)], i // len(ranks) % FILES_PER_RANK), []).append(i)
    work = [
        (registry, shape, modules, rank, number, share, padded_rank, prefix or modules)
        for (rank, number), share in shares.items()
    ]
    targets: dict[int, AdapterTarget] = {}
    if num_processes == 1:
        for part in work:
            targets |= _register(*part)
        return targets
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn"), initializer=_use_one_thread) as pool:
        for done in [pool.submit(_register, *part) for part in work]:
            targets |= done.result()
    return targets


def _use_one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _register(
    registry: Path,
    shape: str,
    modules: str,
    rank: int,
    number: int,
    indices: list[int],
    padded_rank: int | None,
    prefix: str,
) -> dict[int, AdapterTarget]:
    import torch

    factors = random_factors(shape, MODULE_SETS[modules], rank, number, torch.bfloat16)
    if padded_rank:
        factors = {name: pad(lowrank, padded_rank) for name, lowrank in factors.items()}
    binding = BaseBinding(name=f"bench/{shape}", base_id=str(BaseRecord(()).base_id))  # drawn at random: no tensors
    recipe = Recipe(operation="import", method="random", options={"rank": rank, "number": number})
    first = make_adapter(factors, binding, recipe)
    targets = {}
    with Registry.open(registry) as opened:
        adapters = ((first.salted(str(i)), f"{prefix}-{i}") for i in indices)
        for i, version in zip(indices, opened.add_many(adapters), strict=True):
            targets[i] = AdapterTarget(
                serving_digest=version.serving_digest, version_digest=version.digest, label=version.name
            )
    return targets
