"""The leading singular vectors of a delta, on its smaller side, by the cheapest method that is good enough.

    Gram     D Dᵀ and its eigenvalues: the whole spectrum, where the smaller side is at most 1024
    Krylov   an orthonormal basis of [X, (D Dᵀ) X, (D Dᵀ)² X, …] grown block by block, and D's SVD within it
    SVD      LAPACK's, when asked for

Only one side is computed: `factors.fit` finds the other with the pass over D that certifies the result anyway.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flora.extract.products import empty_products, there_and_back

GRAM_SIDE = 1024  # up to here eigenvalues of [side, side] in float64 take a fraction of a second
KRYLOV_DEPTH = 6  # blocks of rank/2: at least 0.9997 of the energy that the best rank columns hold
SAMPLE = 7  # one column of D in so many begins the space; odd, so as not to fall in step with heads of 2^n columns
MIN_BLOCK = 8  # columns; thinner products waste the reading of D
ENERGY_BLOCK = 64  # columns by which the basis grows where an energy, not a rank, says when to stop
OVERSHOOT = 1.3  # how much further the basis grows once it holds the energy, so that the trimmed rank is near the best
EXHAUSTED = 1e-7  # share of the energy left outside a basis that float32 cannot tell from none
DEPENDENT = 1e-6  # ratio of Cholesky's pivots beyond which two rounds in float64 may not be orthonormal in float32
SETTLED = 1 / 4  # squared norm within the basis, of a block of unit rows: taking it away keeps the rest orthonormal
ATTEMPTS = 8  # at that; a first or second has settled every matrix tried
LOST = 1 / 2  # squared norm within the basis, of a unit row that was to be orthogonal to it: it is rounding
FLOOR = 1e-7  # of the largest singular value: what lies below is rounding of float32


@dataclass(frozen=True, slots=True, eq=False)
class Basis:
    """Leading singular vectors of D [small, large] on its small side."""

    vectors: Tensor  # [k, small] float32, orthonormal rows
    values: Tensor  # [k] float64, descending, all positive


def wide(delta: Tensor) -> Tensor:
    """The delta with its smaller side first, [small, large]: bases lie there, where orthogonalizing is cheap."""
    return delta if delta.shape[0] <= delta.shape[1] else delta.T


def factorize(D: Tensor, norm_squared: float, *, max_rank: int, energy: float | None, exact: bool, seed: str) -> Basis:
    """Up to `max_rank` leading singular vectors of D [small, large]; with `energy`, enough to hold that share if so.

    norm_squared  of D;  energy  a share of it
    seed          of the random signs that a Krylov space begins with
    """
    if exact:
        vectors, values = _svd(D)
    elif _wants_spectrum(D.shape[0], max_rank, energy):
        vectors, values = _gram(D)
    else:
        vectors, values = _krylov(D, norm_squared, max_rank, energy, seed) or _gram(D)
    if values[0] == 0:  # elements below 1e-19, whose squares float32 cannot hold; LAPACK scales them first
        vectors, values = _svd(D)
    rank = min(max_rank, int((values > FLOOR * values[0]).sum()))
    return Basis(_fix_signs(vectors[:rank]), values[:rank])


def _wants_spectrum(small: int, max_rank: int, energy: float | None) -> bool:
    """Whether the whole spectrum is needed to choose a rank, or costs less than a Krylov space."""
    if energy is not None and small <= GRAM_SIDE:
        return True
    return energy is None and KRYLOV_DEPTH * _block(max_rank) > small // 2


def _block(max_rank: int) -> int:
    return max(MIN_BLOCK, (max_rank + 1) // 2)


def _svd(D: Tensor) -> tuple[Tensor, Tensor]:
    U, S, _ = torch.linalg.svd(D, full_matrices=False)
    return U.T, S.double()


def _gram(D: Tensor) -> tuple[Tensor, Tensor]:
    """All singular vectors and values from D Dᵀ; above GRAM_SIDE in float32, which halves time and memory."""
    gram = D @ D.T
    return _leading(gram.double() if D.shape[0] <= GRAM_SIDE else gram)


def _krylov(
    D: Tensor, norm_squared: float, max_rank: int, energy: float | None, seed: str
) -> tuple[Tensor, Tensor] | None:
    """D's singular vectors within a block Krylov space, or None if that outgrows half of D's side.

    With Q the basis so far, ‖D - QᵀQD‖² = ‖D‖² - ‖QD‖² exactly: the sum of ‖Q_i D‖² over its blocks tells when an
    energy is reached. The small SVD is that of QD, by its Gram matrix QD(QD)ᵀ = Q(Q D Dᵀ)ᵀ, of which the second form is
    cheaper by large / small: but for the last block, Q_i D Dᵀ is what the next block of the space was made of.
    Source: block Krylov (Musco & Musco 2015); the indicator is that of randQB_EI (Yu, Gu, Li 2018).
    """
    small = D.shape[0]
    most = small // 2
    limit = KRYLOV_DEPTH * _block(max_rank)
    block = min(_block(max_rank), ENERGY_BLOCK) if energy is not None else _block(max_rank)
    rows = min(limit, most)
    Q, QDD, QD = D.new_empty(rows, small), D.new_empty(rows, small), empty_products(block, D)  # QD: the last block's
    k, held = 0, 0.0
    X = _first_rows(D, block, norm_squared, seed)
    while True:
        Q[k : k + block] = orthonormal_rows(X, Q[:k], seed)
        has_next = k + 2 * block <= rows  # most likely: then one walk through D makes both products
        returned = there_and_back(Q[k : k + block], D, QD, back=has_next)
        held += float(torch.linalg.vector_norm(QD, dim=1).double().square().sum())
        k += block
        if energy is not None and held >= energy * norm_squared:
            limit, energy = min(limit, max(int(OVERSHOOT * k), k + block)), None
        if k + block > limit or held >= (1 - EXHAUSTED) * norm_squared:
            break
        if returned is None:
            return None
        X = QDD[k - block : k] = returned
    W, values = _leading(_gram_of_products(Q[:k], QDD[: k - block], QD))
    return W[:max_rank] @ Q[:k], values[:max_rank]


def _first_rows(D: Tensor, block: int, norm_squared: float, seed: str) -> Tensor:
    """[block, small]: random sums of every seventh column of D, or of all where those hold too little of it.

    A sample is as good a beginning as all columns where the change is spread over them; the iteration reads them all.
    """
    for step in (SAMPLE, 1) if D.shape[1] >= 2 * block * SAMPLE else (1,):
        some = D[:, ::step]
        X = (some @ _signs(some.shape[1], block, seed).to(D.device)).T
        if step == 1 or float(torch.linalg.vector_norm(X)) ** 2 > block * norm_squared / (10 * step):
            break
    return X


def _signs(num_rows: int, num_columns: int, seed: str) -> Tensor:
    """[num_rows, num_columns] of +1 and -1: the bits that SHAKE-256 makes of the seed, alike on every machine."""
    count = num_rows * num_columns
    stream = hashlib.shake_256(seed.encode()).digest((count + 7) // 8)
    bits = np.unpackbits(np.frombuffer(stream, np.uint8), count=count).reshape(num_rows, num_columns)
    return torch.from_numpy(bits).float().mul_(2).sub_(1)


def _gram_of_products(Q: Tensor, QDD: Tensor, last_QD: Tensor) -> Tensor:
    """QD(QD)ᵀ, float64 [k, k], from Q [k, small], the rows of Q D Dᵀ but the last block's, and the last block of QD."""
    first = len(QDD)
    gram = torch.empty(len(Q), len(Q), dtype=torch.float64, device=Q.device)
    gram[:first] = QDD @ Q.T
    gram[first:, :first] = gram[:first, first:].T
    gram[first:, first:] = last_QD @ last_QD.T
    return gram  # eigh reads its lower half


def _leading(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of [k, k] as float32 rows and the roots of the eigenvalues, float64, both descending."""
    squares, vectors = torch.linalg.eigh(gram)
    return vectors.flip(1).T.float(), squares.flip(0).double().clamp_min(0).sqrt()


def orthonormal_rows(X: Tensor, Q: Tensor, seed: str) -> Tensor:
    """Rows orthonormal among themselves and to Q's, that span what X's add to Q's; random ones where that is too few.

    Twice is enough (Kahan, Parlett), once without Q, unless Q spans X as it does of a D of low rank: the first round
    then leaves only rounding, and what that points to may lie within Q again. A round settles it if ‖XQᵀ‖² of its unit
    rows was small, for no singular value of X - XQᵀQ is below sqrt(1 - ‖XQᵀ‖²). Rows mostly within Q begin again as
    random signs: of those half or more lies outside, since Q has at most half of all dimensions.
    """
    X, _ = _take_away(Q, X)
    for attempt in range(ATTEMPTS if len(Q) else 0):
        X, within = _take_away(Q, X)
        if not float(within.sum()) > SETTLED:  # nor where D overflows: NaN is settled by nothing
            break
        lost = within > LOST
        X[lost] = _signs(int(lost.sum()), X.shape[1], f"{seed} {len(Q)} {attempt}").to(X.device)
        X, _ = _take_away(Q, X)
    return X


def _take_away(Q: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows of X - XQᵀQ, and how much of each of X's rows was within Q, squared."""
    inside = X @ Q.T
    return _qr_rows(X - inside @ Q), inside.square().sum(1)


def _qr_rows(X: Tensor) -> Tensor:
    """Householder's QR; on a GPU, where that is slow, two rounds of Cholesky's in float64 unless X lacks rank."""
    if X.is_cuda and (rows := cholesky_rows(X)) is not None:
        return rows
    return torch.linalg.qr(X.T).Q.T


def cholesky_rows(X: Tensor) -> Tensor | None:
    """Orthonormal rows that span X's, or None if X's are nearly dependent. Cholesky-QR, twice, in float64."""
    rows = X.double()
    for _ in range(2):
        L, failed = torch.linalg.cholesky_ex(rows @ rows.T)
        if failed or L.diagonal().min() < DEPENDENT * L.diagonal().max():
            return None
        rows = torch.linalg.solve_triangular(L, rows, upper=False)
    return rows.float()


def _fix_signs(vectors: Tensor) -> Tensor:
    """Each row with its largest element positive: LAPACK leaves the sign open."""
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)
