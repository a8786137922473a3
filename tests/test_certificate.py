"""The certificate: exact bound, tables, planning, and honesty under simulated calibrations."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from proteus_fast import _core
from proteus_fast.certificate import (
    MIXING_STEPS,
    TAU_STEPS,
    Certificate,
    Path,
    PathCertificate,
    Status,
    build_dual_path,
    cost_scale,
    count_successes,
    critical_count,
    lower_bound,
    plan,
    round_scores,
    tau_index,
)


def make_path(vertices: int) -> Path:
    return Path(np.linspace(1.0, 0.0, vertices, dtype=np.float32), np.linspace(2.0, 1.0, vertices))


def make_certificate(successes: np.ndarray, n: int, delta: float = 0.1) -> Certificate:
    vertices = (len(successes) - 1) // MIXING_STEPS + 1
    paths = {"dual": PathCertificate(make_path(vertices), successes)}
    return Certificate.build(paths, delta=delta, n=n, data_sha256="0" * 64, date="2026-01-01", rounding_seed=0, key=1)


@pytest.mark.parametrize(("k", "n"), [(0, 7), (1, 5), (5, 5), (850, 1000), (1490, 1500), (4321, 5000)])
@pytest.mark.parametrize("delta", [0.01, 0.05, 0.1, 0.3])
def test_lower_bound_is_clopper_pearson(k: int, n: int, delta: float) -> None:
    expected = stats.beta.ppf(delta, k, n - k + 1) if k else 0.0
    assert lower_bound(k, n, delta) == pytest.approx(expected, abs=1e-9)


@given(st.integers(1, 4000), st.floats(0.001, 0.999), st.sampled_from([1e-6, 0.01, 0.05, 0.1, 0.49]))
def test_critical_count_is_the_binomial_test(n: int, tau: float, delta: float) -> None:
    count = critical_count(n, delta, tau)
    if count <= n:
        assert stats.binom.sf(count - 1, n, tau) <= delta * (1 + 1e-9)
    assert stats.binom.sf(count - 2, n, tau) > delta * (1 - 1e-9) or count == 0


def test_a_certificate_of_many_rows_needs_the_memory_of_few() -> None:
    n = 1 << 24
    successes = np.linspace(n * 0.8, n * 0.3, 2 * MIXING_STEPS + 1).astype(np.int64)
    entry = PathCertificate(make_path(3), successes)
    tracemalloc.start()
    table = entry.table("certified", n, 0.1)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 4 << 20
    assert table.max_index == 799
    for index in (1, 500, 799):
        count = critical_count(n, 0.1, index / 1000)
        assert stats.binom.sf(count - 1, n, index / 1000) <= 0.1 < stats.binom.sf(count - 2, n, index / 1000)


def test_table_is_the_plain_walk() -> None:
    random = np.random.default_rng(0)
    n, vertices = 700, 12
    steps = (vertices - 1) * MIXING_STEPS + 1
    successes = np.clip(650 - np.arange(steps) + random.integers(-12, 12, steps), 0, n)
    certificate = make_certificate(successes, n)
    bounds = {"certified": [lower_bound(int(k), n, 0.1) for k in successes], "calibrated": list(successes / n)}
    for guarantee, index in itertools.product(("certified", "calibrated"), range(0, TAU_STEPS + 1, 7)):
        tau = index / TAU_STEPS
        served = None
        for step in range(steps):
            if bounds[guarantee][step] < tau - 1e-12:
                break
            served = step
        table = certificate.tables["dual"][guarantee]
        assert table.code[index] == (served or 0)
        assert (index <= table.max_index) == (served is not None)


def test_expected_cost_never_falls_with_tau() -> None:
    random = np.random.default_rng(1)
    for _ in range(50):
        steps = 20 * MIXING_STEPS + 1
        successes = np.sort(random.integers(300, 480, steps))[::-1] + random.integers(-8, 8, steps)
        certificate = make_certificate(successes, 500)
        for guarantee in ("certified", "calibrated"):
            reach = certificate.tables["dual"][guarantee].max_index + 1
            assert np.all(np.diff(certificate.expected_cost_usd("dual", guarantee)[:reach]) >= -1e-12)


def test_nothing_certified_is_said_so() -> None:
    certificate = make_certificate(np.zeros(17, np.int64), 5)
    assert certificate.tau_max("dual") is None
    assert certificate.tables["dual"]["certified"].max_index == 0
    assert certificate.tau_max("policy") is None


@pytest.mark.parametrize(("headroom", "labels"), [(0.01, 7552), (0.02, 1845), (0.03, 792)])
def test_plan_matches_published_figures(headroom: float, labels: int) -> None:
    assert plan(0.9, headroom, 0.05) == labels


@settings(max_examples=25)
@given(st.floats(0.3, 0.95), st.floats(0.02, 0.05), st.sampled_from([0.02, 0.05, 0.1, 0.2]))
def test_plan_has_the_power_it_promises(tau: float, headroom: float, delta: float) -> None:
    n = plan(tau, headroom, delta)
    # what is served for a target between the grid's is the next one
    served = tau_index(tau) / TAU_STEPS

    def power(rows: int) -> float:
        return float(stats.binom.sf(critical_count(rows, delta, served) - 1, rows, tau + headroom))

    assert all(power(rows) >= 0.9 - 1e-9 for rows in range(n, n + 40))
    assert power(n - 1) < 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 0.1, 0.1), "tau: expected"),
        ((0.9, 0.0, 0.1), "headroom: expected"),
        ((0.9, 0.2, 0.1), "headroom: expected"),
        ((0.9, 1e-5, 0.1), "headroom: expected"),
        (
            (0.8501, 0.0015, 0.1),
            r"headroom: expected at least one step .* above 0\.851, which is served",
        ),
        ((0.9, float("nan"), 0.1), "headroom: expected"),
        ((0.9, 0.01, 0.5), "delta: expected"),
        ((0.9, 0.01, float("nan")), "delta: expected"),
    ],
)
def test_plan_refuses(arguments: tuple[float, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(*arguments)


def test_tau_index_rounds_up_but_not_for_float32() -> None:
    for index in range(TAU_STEPS + 1):
        assert tau_index(index / TAU_STEPS) == index
        assert tau_index(float(np.float32(index / TAU_STEPS))) == index
    assert tau_index(0.8501) == 851
    assert tau_index(-0.0) == 0
    for wrong in (float("nan"), -0.1, 1.0001, float("inf")):
        with pytest.raises(ValueError, match="tau: expected"):
            tau_index(wrong)


def test_rounding_keeps_means_and_whole_scores() -> None:
    score = np.tile([0.0, 1.0, 0.3], (20_000, 1))
    rounded = round_scores(score, seed=3)
    assert np.array_equal(rounded[:, :2], score[:, :2])
    assert abs(rounded[:, 2].mean() - 0.3) < 4 * np.sqrt(0.21 / 20_000)
    assert np.array_equal(rounded, round_scores(score, seed=3))


def test_successes_count_every_step_as_the_engine_serves_it() -> None:
    random = np.random.default_rng(2)
    vertices, n, candidates = 5, 400, 3
    choice = random.integers(0, candidates, (vertices, n)).astype(np.int32)
    outcome = random.integers(0, 2, (n, candidates)).astype(np.uint8)
    u = _core.row_hash(random.standard_normal((n, 4)).astype(np.float32), 99)
    counts = count_successes(make_path(vertices), choice, outcome, u)
    rows = np.arange(n)
    for code in range((vertices - 1) * MIXING_STEPS + 1):
        vertex, share = divmod(code, MIXING_STEPS)
        side = vertex + ((u >> np.uint64(60)) < share)
        assert counts[code] == outcome[rows, choice[np.minimum(side, vertices - 1), rows]].sum()


def synthetic(random: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True accuracies, outcomes and prices of four candidates on n queries."""
    hard = random.random((n, 1))
    p = np.clip(np.array([0.95, 0.9, 0.8, 0.7]) - hard * np.array([0.15, 0.35, 0.5, 0.6]), 0.02, 0.98)
    return p, (random.random(p.shape) < p).astype(np.float64), np.array([4.0, 1.0, 0.3, 0.1]) * 1e-3


def test_cost_scale_and_path() -> None:
    p, score, price = synthetic(np.random.default_rng(4), 2000)
    c = price / price.max()
    kappa = cost_scale(p, c)
    assert (np.argmax(p - kappa * c, axis=1) == 3).mean() >= 0.99
    assert (np.argmax(p - 0.9 * kappa * c, axis=1) == 3).mean() < 0.995
    path = build_dual_path(p, score, price, cost_unit_usd=float(price.max()), kappa=kappa, gamma=4.0)
    assert np.all(np.diff(path.parameter) < 0)
    assert np.all(np.diff(path.expected_cost_usd) < 0)
    assert len(path.parameter) <= 64
    assert path.parameter[-1] >= 0.0


def test_prices_that_are_nearly_equal_do_not_blow_up_the_path() -> None:
    p, score, _ = synthetic(np.random.default_rng(6), 2000)
    for twin in (1e-19, 1e-9, 1e-5, 1e-3):
        price = np.array([4e-3, 1e-3, 1e-4 * (1 + twin), 1e-4])
        kappa = cost_scale(p, price / price.max())
        path = build_dual_path(p, score, price, cost_unit_usd=4e-3, kappa=kappa, gamma=4.0)
        assert kappa <= 1e8
        assert len(path.parameter) >= 32
    assert cost_scale(p, np.ones(4)) == 1.0
    free = build_dual_path(p, score, np.zeros(4), cost_unit_usd=1e-12, kappa=1.0, gamma=4.0)
    assert len(free.parameter) == 1


@pytest.mark.parametrize("delta", [0.05, 0.1])
def test_certificate_is_honest_under_exchangeability_and_not_under_shift(delta: float) -> None:
    """4,000 calibrations: violations stay below delta + 1 point for every target; where accuracy drops, they do not."""
    random = np.random.default_rng(5)
    p, score, price = synthetic(random, 6000)
    kappa = cost_scale(p, price / 4e-3)
    path = build_dual_path(p, score, price, cost_unit_usd=4e-3, kappa=kappa, gamma=4.0, vertices=16)
    weight = kappa * (1.0 - path.parameter.astype(np.float64)) ** 4.0
    choice = np.stack([np.argmax(p - w * price / 4e-3, axis=1) for w in weight]).astype(np.int32)
    u = random.integers(0, 2**63, len(p), dtype=np.uint64) * np.uint64(2)
    rows = np.arange(len(p))
    steps = (len(path.parameter) - 1) * MIXING_STEPS + 1
    right = np.empty((steps, len(p)), np.float32)
    for code in range(steps):
        vertex, share = divmod(code, MIXING_STEPS)
        side = np.minimum(vertex + ((u >> np.uint64(60)) < share), len(path.parameter) - 1)
        right[code] = score[rows, choice[side, rows]]
    population = right.mean(axis=1)
    n, draws = 600, 4000
    targets = np.round(np.linspace(population[-1] + 0.01, population[0] - 0.05, 8), 3)
    least = [critical_count(n, delta, tau) for tau in targets]
    violations, shifted, served = np.zeros(8), np.zeros(8), np.zeros(8)
    for _ in range(draws // 400):
        counts = random.multinomial(n, np.full(len(p), 1 / len(p)), size=400).astype(np.float32)
        reached = np.minimum.accumulate(counts @ right.T, axis=1)
        for i, tau in enumerate(targets):
            passed = (reached >= least[i]).sum(axis=1)
            accuracy = population[np.maximum(passed - 1, 0)]
            violations[i] += ((passed > 0) & (accuracy < tau)).sum()
            shifted[i] += ((passed > 0) & (accuracy - 0.05 < tau)).sum()
            served[i] += (passed > 0).sum()
    assert np.all(served > 0.9 * draws)
    assert np.all(violations / draws <= delta + 0.01)
    assert np.all(shifted / draws > 3 * delta)


def test_status_numbers_are_fixed() -> None:
    assert [status.value for status in Status] == [0, 1, 2, 3, 4]
