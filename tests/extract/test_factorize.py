"""Every method against numpy's full SVD in float64."""

import numpy as np
import pytest
import torch

from flora.extract.factorize import SAMPLE, cholesky_rows, factorize, orthonormal_rows, wide
from flora.extract.fit import fit
from flora.extract.products import empty_products, there_and_back
from tests.extract.models import best_share, residual_share


def matrix(shape, decay: float, seed: int = 0, noise: float = 0.0, rank: int | None = None) -> torch.Tensor:
    """Singular values 1/i^decay up to `rank`, and white noise."""
    generator = torch.Generator().manual_seed(seed)
    rank = rank or min(shape)
    U = torch.linalg.qr(torch.randn(shape[0], rank, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(shape[1], rank, generator=generator, dtype=torch.float64)).Q
    S = torch.arange(1, rank + 1, dtype=torch.float64) ** -decay
    return ((U * S) @ V.T + noise * torch.randn(shape, generator=generator)).float()


def factorized(D: torch.Tensor, max_rank: int, energy: float | None = None, *, exact: bool = False, seed: int = 0):
    norm_squared = float(D.double().square().sum())
    return factorize(D, norm_squared, max_rank=max_rank, energy=energy, exact=exact, seed=str(seed))


def held_share(D: torch.Tensor, vectors: torch.Tensor) -> float:
    """Energy within the rows of `vectors`."""
    D = D.double().numpy()
    return float(np.square(vectors.double().numpy() @ D).sum() / np.square(D).sum())


@pytest.mark.parametrize("shape", [(63, 100), (100, 100)])
def test_gram_and_exact_find_the_singular_vectors(shape):
    D = matrix(shape, decay=0.5)
    S = np.linalg.svd(D.double().numpy(), compute_uv=False)

    for basis in (factorized(D, 32), factorized(D, 32, exact=True)):
        np.testing.assert_allclose(basis.values.numpy(), S[:32], rtol=1e-4)
        assert held_share(D, basis.vectors) == pytest.approx(best_share(D.double().numpy(), 32), abs=1e-6)


@pytest.mark.parametrize("decay", [0.5, 1.0])
@pytest.mark.parametrize("rank", [4, 16, 32])
def test_krylov_holds_within_3e_4_of_what_any_columns_can(rank, decay):
    D = matrix((400, 500), decay, seed=rank, noise=1e-3)

    basis = factorized(D, rank)

    assert len(basis.values) == rank
    assert best_share(D.double().numpy(), rank) - held_share(D, basis.vectors) < 3e-4


@pytest.mark.parametrize("max_rank", [16, 150])  # Krylov, Gram
def test_vectors_are_orthonormal_and_values_descend(max_rank):
    basis = factorized(matrix((400, 500), 0.5), max_rank)

    gram = basis.vectors.double() @ basis.vectors.double().T
    torch.testing.assert_close(gram, torch.eye(max_rank, dtype=torch.float64), atol=1e-5, rtol=0)
    assert bool((basis.values[1:] <= basis.values[:-1]).all())


def test_a_krylov_basis_grows_until_it_holds_the_energy_and_its_rank_is_near_the_best():
    D = matrix((1100, 1200), decay=0.5, rank=200)
    shares = np.cumsum(1 / np.arange(1, 201)) / np.sum(1 / np.arange(1, 201))  # its singular values are 1/sqrt(i)

    basis = factorized(D, 1100, energy=0.8)

    held = np.cumsum(basis.values.numpy() ** 2) / float(D.double().square().sum())
    assert len(basis.values) < 200
    assert int(np.argmax(held >= 0.8)) <= 1.05 * int(np.argmax(shares >= 0.8))


def test_a_delta_near_full_rank_outgrows_krylov_and_gets_its_whole_spectrum():
    D = matrix((1100, 1100), decay=0.0)

    basis = factorized(D, 1100, energy=0.9)

    assert len(basis.values) == 1100
    assert held_share(D, basis.vectors[:991]) > 0.9


def test_a_delta_of_low_rank_is_found_whole_and_no_further():
    D = matrix((400, 500), decay=1.0, rank=16)

    basis = factorized(D, 32)

    assert held_share(D, basis.vectors[:16]) > 1 - 1e-6
    assert float(basis.values[16:].square().sum() / basis.values.square().sum()) < 1e-8


def of_low_rank(shape: tuple[int, int], rank: int, seed: int, *, scale: float = 1.0, noise: float = 0.0):
    """A product of normal factors, as a merged LoRA leaves it, plus white noise of `noise` beside elements near 1."""
    generator = torch.Generator().manual_seed(seed)
    B, A = (torch.randn(size, generator=generator) for size in ((shape[0], rank), (rank, shape[1])))
    return scale * (B @ A + noise * torch.randn(shape, generator=generator))


def faults(delta: torch.Tensor, max_rank: int, seed: int, energy: float | None = None) -> list[str]:
    """Where a basis claims more than there is, or float32 factors made of it keep less than numpy's would."""
    exact = delta.double().numpy()
    basis = factorized(wide(delta), max_rank, energy, seed=seed)
    claimed = float(basis.values.square().sum()) / np.square(exact).sum()
    rank = len(basis.values)
    gram = basis.vectors.double() @ basis.vectors.double().T
    skew = float((gram - torch.eye(rank, dtype=torch.float64)).abs().max())
    kept = 1 - residual_share(exact, fit(delta, basis, rank, torch.float32).factors)
    missed = best_share(exact, max_rank) - kept
    found = []
    found += [f"claims {claimed:.6f} of its norm"] if claimed > 1 + 2e-6 else []
    found += [f"not orthonormal by {skew:.1e}"] if skew > 1e-5 else []
    found += [f"keeps {missed:.1e} less than the best"] if missed > 1e-5 else []
    return [f"seed {seed}, {tuple(delta.shape)}: {fault}" for fault in found]


@pytest.mark.parametrize(("rank", "max_rank"), [(1, 4), (1, 16), (4, 4), (4, 16), (16, 4), (16, 16), (16, 32)])
def test_a_delta_of_exactly_low_rank_is_not_overestimated_and_loses_nothing(rank, max_rank):
    """What a block adds to the basis is rounding here, which may point back into it."""
    shapes = [(200, 300), (300, 200), (128, 512), (64, 64)]

    found = [f for seed in range(200) for f in faults(of_low_rank(shapes[seed % 4], rank, seed), max_rank, seed)]

    assert not found, "\n".join(found)


def test_no_scale_no_noise_and_no_untouched_row_makes_a_delta_of_low_rank_lose_any():
    found = []
    for seed in range(200):
        scale, noise = 10.0 ** (seed % 13 - 8), (0.0, 1e-7, 1e-5, 1e-4)[seed % 4]  # 1e-8 to 1e4
        delta = of_low_rank((160, 240), (1, 4, 16)[seed % 3], seed, scale=scale, noise=noise)
        if seed % 5 == 0:
            delta[::2] = 0
        found += faults(delta, 16, seed)

    assert not found, "\n".join(found)


@pytest.mark.parametrize("energy", [None, 1.0])
def test_large_deltas_of_low_rank_lose_nothing_either(energy):
    """Where an energy is asked for, too, which at this size grows a Krylov space."""
    found = []
    for seed in range(6):
        delta = of_low_rank([(1030, 1100), (2048, 1040)][seed % 2], (1, 4, 16)[seed % 3], seed)
        found += faults(delta, 32, seed, energy)

    assert not found, "\n".join(found)


@pytest.mark.parametrize("is_zero", [False, True])
def test_rows_that_a_basis_spans_already_make_room_for_others(is_zero):
    generator = torch.Generator().manual_seed(0)
    Q = torch.eye(100)[:40]
    X = 0 * Q[:8] if is_zero else torch.randn(8, 40, generator=generator) @ Q

    rows = orthonormal_rows(X, Q, seed="0")

    torch.testing.assert_close(rows @ rows.T, torch.eye(8), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows @ Q.T, torch.zeros(8, 40), atol=1e-6, rtol=0)


def test_deltas_too_small_to_square_in_float32_are_factorized_all_the_same():
    D = matrix((63, 100), decay=1.0)

    tiny = factorized(D * 2.0**-80, 8)

    np.testing.assert_allclose(tiny.values.numpy() * 2.0**80, factorized(D, 8).values.numpy(), rtol=1e-4)


def test_the_same_seed_gives_the_same_bits_and_another_seed_the_same_numbers():
    D = matrix((400, 500), decay=1.0)

    first, again, other = (factorized(D, 16, seed=seed) for seed in (7, 7, 8))

    assert torch.equal(first.vectors, again.vectors)
    assert torch.equal(first.values, again.values)
    assert not torch.equal(first.vectors, other.vectors)
    torch.testing.assert_close(first.vectors, other.vectors, atol=2e-2, rtol=0)  # signs included


@pytest.mark.parametrize("shape", [(400, 700), (700, 400)])
def test_a_change_in_columns_that_the_first_sample_misses_is_found_all_the_same(shape):
    D = matrix(shape, decay=0.5, rank=8)
    D = wide(D).contiguous() if shape[0] < shape[1] else wide(D)  # stored by rows, by columns
    D[:, ::SAMPLE] = 0

    basis = factorized(D, 16)

    assert held_share(D, basis.vectors) > 1 - 1e-6


def test_cholesky_rows_are_orthonormal_and_refuse_dependent_ones():
    X = torch.randn(8, 60, generator=torch.Generator().manual_seed(0))

    rows = cholesky_rows(X)

    torch.testing.assert_close(rows @ rows.T, torch.eye(8), atol=1e-6, rtol=0)
    torch.testing.assert_close((X @ rows.T) @ rows, X, atol=1e-5, rtol=0)  # the same space
    assert cholesky_rows(torch.cat([X, X[:1]])) is None


def test_wide_puts_the_smaller_side_first():
    assert wide(torch.zeros(3, 5)).shape == (3, 5)
    assert wide(torch.zeros(5, 3)).shape == (3, 5)


@pytest.mark.parametrize("is_stored_by_columns", [False, True])
@pytest.mark.parametrize("back", [False, True])
def test_products_in_pieces_are_the_products(monkeypatch, is_stored_by_columns, back):
    monkeypatch.setattr("flora.extract.products.PIECE", 7 * 20)  # seven columns at once
    generator = torch.Generator().manual_seed(0)
    D = torch.randn(20, 50, generator=generator, dtype=torch.float64)
    D = D.T.contiguous().T if is_stored_by_columns else D
    Q = torch.randn(6, 20, generator=generator, dtype=torch.float64)
    QD = empty_products(6, D)

    returned = there_and_back(Q, D, QD, back=back)

    torch.testing.assert_close(QD, Q @ D)
    if back:
        torch.testing.assert_close(returned, Q @ D @ D.T)
    else:
        assert returned is None
