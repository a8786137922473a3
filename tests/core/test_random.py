"""The counter-based generator and the Beta sampler, by known answers and by law."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats

from proteus_fast import _core
from proteus_kernels import reference
from tests.core.routers import random_router


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


def reference_words(seed: int, row: int, tries: int) -> np.ndarray:
    counter = [[row & 0xFFFFFFFF, row >> 32, attempt, 0] for attempt in range(tries)]
    return reference.philox_ref(torch.tensor(counter), seed).numpy()


def test_the_reference_draws_the_same_words() -> None:
    assert reference_words(0, 0, 1).tolist() == _core.philox(0, 0, 1).tolist()
    random = np.random.default_rng(1)
    corners = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
    pairs = [(seed, row) for seed in corners for row in corners]
    pairs += [(int(seed), int(row)) for seed, row in random.integers(0, 2**64, (300, 2), dtype=np.uint64)]
    for seed, row in pairs:
        tries = int(random.integers(1, reference.BETA_TRIES + 1))
        np.testing.assert_array_equal(reference_words(seed, row, tries), _core.philox(seed, row, tries))


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_the_reference_draws_the_same_betas(seed: int) -> None:
    n = 20_000
    random = np.random.default_rng(2)
    conc1, conc0 = 1.0 + np.exp(random.uniform(-8.0, 6.0, (2, n)))
    conc1[::7], conc0[::5] = 1.0, 1.0
    expected = _core.sample_beta(conc1, conc0, seed=seed)
    first, second, rows = torch.from_numpy(conc1), torch.from_numpy(conc0), torch.arange(n)
    drawn = reference.sample_beta_ref(first, second, seed, rows).numpy()
    np.testing.assert_allclose(drawn, expected, rtol=1e-9, atol=0)
    # a draw belongs to its row, whatever rows are drawn beside it
    some = torch.from_numpy(random.permutation(n)[:100])
    alone = reference.sample_beta_ref(first[some], second[some], seed, some).numpy()
    np.testing.assert_array_equal(alone, drawn[some])


def test_rows_of_the_reference_are_64_bit() -> None:
    """Beta(1, 1) is never rejected: the draw is the first uniform number of the row's first try."""
    rows = [0, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40, 2**63 - 1]
    ones = torch.ones(len(rows), dtype=torch.float64)
    for seed in (3, 2**64 - 1):
        drawn = reference.sample_beta_ref(ones, ones, seed, torch.tensor(rows)).numpy()
        words = np.array([_core.philox(seed, row, 1)[0, 0] for row in rows])
        np.testing.assert_allclose(drawn, ((words >> 9) + 0.5) * 2.0**-23, rtol=1e-12)


def test_the_engine_samples_what_the_reference_draws() -> None:
    """Sampled decisions, by seed and row: the law is the policy's, the numbers are the reference's."""
    random = np.random.default_rng(4)
    for seed in (0, 7, 2**63, 2**64 - 1):
        router = dataclasses.replace(random_router(random, hidden=24), policy=None)
        rows = 400
        x = random.standard_normal((rows, router.input_dim)).astype(np.float32)
        tau = random.random(rows)
        _, mu, _, _, _ = router.build().route(x, tau, "policy", sample=True, seed=seed)
        tensors = {name: torch.from_numpy(tensor).double() for name, tensor in router.tensors.items()}
        z = reference.project_ref(torch.from_numpy(x).double(), tensors)
        conc1, conc0, _ = reference.policy_ref(z, torch.from_numpy(tau), tensors, router.head or "")
        drawn = reference.sample_beta_ref(conc1, conc0, seed, torch.arange(rows))
        np.testing.assert_allclose(mu, drawn, rtol=0, atol=1e-5)
        # each row has its own draw
        assert len(np.unique(drawn)) == rows
