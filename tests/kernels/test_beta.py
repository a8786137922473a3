"""The sampler: the core's draws number for number, and the law over its range."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from proteus_fast import _core
from proteus_kernels.beta import sample_beta
from tests.kernels.snapshots import DEVICE, on_device


def state(seed: int, offset: int = 0) -> torch.Tensor:
    return on_device(np.array([seed, offset], np.uint64))


def draw(conc1: np.ndarray, conc0: np.ndarray, seed: int, offset: int = 0) -> np.ndarray:
    drawn: np.ndarray = sample_beta(on_device(conc1), on_device(conc0), state(seed, offset)).cpu().numpy()
    return drawn


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1])
def test_draws_are_the_cores(seed: int) -> None:
    rng = np.random.default_rng(2)
    conc1, conc0 = 1.0 + np.exp(rng.uniform(-8.0, 6.0, (2, 3000)))
    conc1[::7], conc0[::5] = 1.0, 1.0
    expected = _core.sample_beta(conc1, conc0, seed=seed)
    np.testing.assert_allclose(draw(conc1, conc0, seed), expected, rtol=1e-9, atol=0)
    # a draw belongs to its row: an offset moves along the stream
    np.testing.assert_array_equal(draw(conc1[1000:], conc0[1000:], seed, 1000), draw(conc1, conc0, seed)[1000:])
    single = draw(conc1.astype(np.float32), conc0.astype(np.float32), seed)
    assert single.dtype == np.float32
    rounded = _core.sample_beta(conc1.astype(np.float32).astype(float), conc0.astype(np.float32).astype(float), seed)
    np.testing.assert_allclose(single, rounded, rtol=1e-6, atol=0)


@pytest.mark.parametrize("offset", [2**31 - 5, 2**32 - 5, 2**40, 2**63 - 20])
def test_rows_are_64_bit(offset: int) -> None:
    """Beta(1, 1) is never rejected: the draw is the first uniform number of the row's first try."""
    drawn = draw(np.ones(10), np.ones(10), 3, offset)
    words = np.array([_core.philox(3, offset + row, 1)[0, 0] for row in range(10)])
    np.testing.assert_allclose(drawn, ((words >> 9) + 0.5) * 2.0**-23, rtol=1e-12)


@pytest.mark.parametrize(
    ("conc1", "conc0"),
    [(1.0, 1.0), (1.0, 1.001), (1.0, 33.0), (33.0, 1.0), (1.5, 1.2), (2.0, 5.0), (30.0, 4.0), (200.0, 300.0)],
)
def test_samples_follow_the_beta(conc1: float, conc0: float) -> None:
    samples = draw(np.full(20_000, conc1), np.full(20_000, conc0), seed=11)
    assert ((samples > 0.0) & (samples < 1.0)).all()
    assert stats.kstest(samples, stats.beta(conc1, conc0).cdf).pvalue > 1e-3


def test_other_seeds_are_other_numbers() -> None:
    ones = np.full(500, 2.0)
    assert (draw(ones, ones, 5) != draw(ones, ones, 6)).all()
    assert len(np.unique(draw(ones, ones, 5))) == 500
    assert sample_beta(on_device(ones[:0]), on_device(ones[:0]), state(1)).shape == (0,)


def test_wrong_arguments() -> None:
    ones = torch.ones(4, device=DEVICE)
    with pytest.raises(TypeError, match=r"^conc1: expected float32 or float64, got int64"):
        sample_beta(ones.long(), ones, state(1))
    with pytest.raises(TypeError, match=r"^state: expected int64, got float32"):
        sample_beta(ones, ones, ones[:2])
    with pytest.raises(ValueError, match=r"^conc0, state: expected shapes"):
        sample_beta(ones, ones[:3], state(1))
