"""Whether low rank is the right tool, on matrices whose nature is known."""

import numpy as np
import pytest
import torch

from flora.adapter import ChangeReport, TensorChange
from flora.diagnosis import diagnose, diagnose_report, kinds
from flora.rank import signal_rank


def white(m: int, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((m, n))


def spiked(m: int, n: int, rank: int, strength: float, seed: int = 0) -> np.ndarray:
    """White noise of variance 1, and `rank` directions that are `strength` times its largest singular value."""
    rng = np.random.default_rng(seed)
    left, right = np.linalg.qr(rng.standard_normal((m, rank)))[0], np.linalg.qr(rng.standard_normal((n, rank)))[0]
    return rng.standard_normal((m, n)) + strength * (np.sqrt(m) + np.sqrt(n)) * left @ right.T


def spectrum(delta: np.ndarray, terms: int | None = None) -> tuple[torch.Tensor, float, tuple[int, ...]]:
    return torch.from_numpy(np.linalg.svd(delta, compute_uv=False)[:terms]), float(np.square(delta).sum()), delta.shape


def change(delta: np.ndarray, rank: int, **fields) -> TensorChange:
    """What an extraction of `rank` terms records of this delta."""
    values, norm_squared, shape = spectrum(delta, rank)
    signal = signal_rank(values, norm_squared, shape)
    record = {
        "name": "w.weight",
        "shape": shape,
        "status": "extracted",
        "norm_squared": norm_squared,
        "kept": float(values.square().sum()),
        "rank": rank,
        "changed_share": np.count_nonzero(delta) / delta.size,
        "signal_rank": signal,
        "signal_energy": float(values[:signal].square().sum()),
    }
    return TensorChange(**record | fields)


@pytest.mark.parametrize(("m", "n"), [(200, 200), (120, 480)])
@pytest.mark.parametrize("planted", [1, 7, 16])
def test_the_signal_rank_is_that_of_the_planted_signal(m, n, planted):
    delta = spiked(m, n, planted, strength=1.6)

    assert signal_rank(*spectrum(delta)) == planted
    assert signal_rank(*spectrum(delta, terms=40)) == planted


@pytest.mark.parametrize("seed", range(5))
def test_white_noise_holds_no_signal(seed):
    assert signal_rank(*spectrum(white(150, 300, seed))) == 0


def test_where_every_computed_term_stands_out_the_signal_rank_is_not_known():
    assert signal_rank(*spectrum(spiked(200, 200, 16, strength=2.0), terms=10)) is None


def test_an_exact_low_rank_is_its_own_signal_rank():
    delta = white(100, 5) @ white(5, 80, seed=1)

    assert signal_rank(*spectrum(delta, terms=5)) == 5


def test_a_few_strong_directions_are_low_rank():
    assert diagnose(change(spiked(200, 200, 7, strength=4.0), rank=16)) == "low_rank"


def test_white_noise_is_near_full_rank_at_any_rank():
    assert diagnose(change(white(150, 150), rank=16)) == "near_full_rank"
    assert diagnose(change(white(150, 150), rank=150)) == "near_full_rank"


def test_a_rank_that_ends_amid_the_signal_is_cut_short():
    assert diagnose(change(spiked(200, 200, 40, strength=3.0), rank=8)) == "cut_short"


def test_few_changed_weights_that_form_no_low_rank_are_sparse():
    delta = white(200, 200) * (np.random.default_rng(1).random((200, 200)) < 0.1)

    assert diagnose(change(delta, rank=16)) == "sparse"


def test_few_changed_weights_that_form_a_low_rank_are_low_rank():
    delta = np.zeros((200, 200))
    delta[:3] = white(3, 200)

    assert diagnose(change(delta, rank=16)) == "low_rank"


def test_storage_noise_is_not_held_against_low_rank():
    delta = spiked(200, 200, 7, strength=1.6)  # 7 * 45² of signal, 200² of noise

    assert diagnose(change(delta, rank=16)) == "near_full_rank"
    assert diagnose(change(delta, rank=16, noise=200.0 * 200)) == "low_rank"


def test_where_noise_is_all_of_the_change_it_makes_no_rank_low():
    dense, sparse = white(200, 200), white(200, 200) * (np.random.default_rng(1).random((200, 200)) < 0.1)

    for share in (0.8, 1.0):
        assert diagnose(change(dense, rank=16, noise=share * np.square(dense).sum())) == "near_full_rank"
        assert diagnose(change(sparse, rank=16, noise=share * np.square(sparse).sum())) == "sparse"


def test_what_keeps_most_of_the_whole_is_low_rank_whatever_its_noise():
    delta = white(100, 5) @ white(5, 80, seed=1)

    assert diagnose(change(delta, rank=5, noise=float(np.square(delta).sum()))) == "low_rank"


def test_an_import_has_no_spectrum_to_judge_by():
    assert diagnose(TensorChange(name="w", shape=(4, 4), status="extracted", norm_squared=1.0, kept=1.0)) is None


def test_the_whole_change_is_what_holds_most_of_it():
    low, noise = change(spiked(200, 200, 7, strength=4.0), rank=16), change(0.1 * white(150, 150), rank=16)
    still = TensorChange(name="n", shape=(4,), status="unchanged", norm_squared=0.0)

    assert diagnose_report(ChangeReport(tensors=(low, noise, still))) == "low_rank"
    assert kinds(ChangeReport(tensors=(low, noise)))["near_full_rank"] < 0.01
    assert diagnose_report(ChangeReport(tensors=(still,))) == "unchanged"
