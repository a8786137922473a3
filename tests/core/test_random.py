"""The counter-based generator and the Beta sampler, by known answers and by law."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from proteus_fast import _core


def test_philox_known_answer() -> None:
    # Random123's vector for counter 0 and key 0
    assert [f"{word:08x}" for word in _core.philox(0, 0, 1)[0]] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def test_philox_counts_rows_and_tries() -> None:
    words = _core.philox(3, 5, 4)
    assert words.shape == (4, 4)
    assert words.dtype == np.uint32
    np.testing.assert_array_equal(words[:2], _core.philox(3, 5, 2))
    distinct = {tuple(_core.philox(seed, row, 1)[0]) for seed in (0, 1, 1 << 32) for row in (0, 1, 1 << 32)}
    assert len(distinct) == 9


@pytest.mark.parametrize(
    ("conc1", "conc0"),
    [(1.0, 1.0), (1.0, 1.001), (1.0, 33.0), (33.0, 1.0), (1.5, 1.2), (2.0, 5.0), (30.0, 4.0), (200.0, 300.0)],
)
def test_samples_follow_the_beta(conc1: float, conc0: float) -> None:
    n = 100_000
    samples = _core.sample_beta(np.full(n, conc1), np.full(n, conc0), seed=11)
    assert ((samples > 0.0) & (samples < 1.0)).all()
    assert stats.kstest(samples, stats.beta(conc1, conc0).cdf).pvalue > 1e-3


def test_samples_repeat_by_seed_and_row() -> None:
    a, b = np.full(100, 2.0), np.full(100, 3.0)
    first = _core.sample_beta(a, b, seed=5)
    np.testing.assert_array_equal(first, _core.sample_beta(a, b, seed=5))
    np.testing.assert_array_equal(first[:10], _core.sample_beta(a[:10], b[:10], seed=5))
    assert (first != _core.sample_beta(a, b, seed=6)).all()
    assert len(np.unique(first)) == 100
