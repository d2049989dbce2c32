"""How long an extraction may take, from headers and a product of a few milliseconds on this machine.

Counted are the products that dominate, in units of one skinny product's speed; the rest are passes over memory. Meant
to tell seconds from minutes from hours: the disk, if files are not in its cache, and other load come on top.
"""

import time

import torch

from flora.extract.config import ExtractConfig
from flora.extract.factorize import GRAM_SIDE, KRYLOV_DEPTH
from flora.extract.plan import ExtractionPlan

_SIDE, _ROWS, _REPEATS = 1024, 32, 6  # of the product that is timed: a block of 32 against [1024, 1024]
_SECONDS_PER_ELEMENT = 8e-9  # of one thread: reading, subtracting, summing, noise
_SECONDS_PER_BYTE = 1e-9  # of one thread: sha256 of both files
_EFFICIENCY = 0.6  # of the timed product's speed, in products of real sizes and what lies between them
_EIGEN = 14  # operations per side³ of a symmetric eigenproblem, at the speed of products
_SVD = 13  # operations per side² * other side of LAPACK's SVD, likewise


def estimate_seconds(plan: ExtractionPlan, config: ExtractConfig) -> float | None:
    """Seconds of work on the CPU, start of the process not counted; None for another device, which is not predicted."""
    if config.device != "cpu":
        return None
    modules = plan.extractable
    operations = sum(count_operations(pair.matrix_shape, plan.ranks[pair.name], config) for pair in modules)
    elements = sum(pair.num_bytes for pair in plan.pairs) / 4  # of one side, at two bytes each
    serial = (
        operations / (_EFFICIENCY * _product_speed())
        + elements * _SECONDS_PER_ELEMENT
        + plan.read_bytes * _SECONDS_PER_BYTE
    )
    return serial / max(1, torch.get_num_threads())


def count_operations(shape: tuple[int, int], rank: int, config: ExtractConfig) -> float:
    """Floating-point operations for one delta of `shape` that may get `rank` terms.

    Mirrors `factorize`: LAPACK for exact, Gram and eigenvalues where the whole spectrum is wanted, else a Krylov space.
    """
    small, large = sorted(shape)
    fit = 2.0 * rank * small * large
    columns = KRYLOV_DEPTH * (rank + 1) // 2
    if config.exact:
        return _SVD * float(small) ** 2 * (small + large) + fit
    if (config.rule.energy is not None and small <= GRAM_SIDE) or columns > small // 2:
        return 2.0 * small**2 * large + _EIGEN * float(small) ** 3 + fit
    return 4.0 * columns * small * large + 6.0 * columns**2 * (small + large) + fit


def _product_speed() -> float:
    """Operations a second of one thread on a skinny float32 product, the best of a few: the rest is noise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        X, D = torch.randn(_ROWS, _SIDE), torch.randn(_SIDE, _SIDE)
        best = min(_time_product(X, D) for _ in range(_REPEATS))
    finally:
        torch.set_num_threads(before)
    return 2.0 * _ROWS * _SIDE * _SIDE / best


def _time_product(X: torch.Tensor, D: torch.Tensor) -> float:
    start = time.perf_counter()
    X @ D
    return max(time.perf_counter() - start, 1e-9)
