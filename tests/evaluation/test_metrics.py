"""Hull, oracle and cost at equal accuracy against linear programmes; curves, bootstrap, steps of a path."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
from numpy.typing import NDArray

from proteus_fast import Router, _core
from proteus_fast.certificate import count_successes, round_scores, tau_index
from proteus_fast.evaluation.metrics import (
    SELECTION_TARGETS,
    bootstrap_costs,
    bootstrap_log_ratio,
    cost_at_accuracy,
    fixed_curve,
    hull_cost,
    leak_limit,
    median_correlation,
    oracle_cost,
    plug_in_curve,
    realised,
    relative_targets,
    selection_cost,
    step_choices,
)
from proteus_fast.evaluation.outcomes import OutcomeTable, concatenate, read_table
from tests.conftest import TABLES
from tests.evaluation import synthetic

FloatArray = NDArray[np.float64]


def mixture_lp(accuracy: FloatArray, cost: FloatArray, tau: float) -> float:
    """Least cost of any mixture of policies with at least this accuracy, NaN where there is none."""
    result = scipy.optimize.linprog(
        cost, A_ub=-accuracy[None], b_ub=[-tau], A_eq=np.ones((1, len(cost))), b_eq=[1.0], method="highs"
    )
    return float(result.fun) if result.success else float("nan")


def assignment_lp(table: OutcomeTable, tau: float) -> float:
    """The oracle's linear programme as it stands: shares of every row, (n, K), rows summing to 1."""
    n, candidates = table.score.shape
    sums = scipy.sparse.kron(scipy.sparse.eye(n), np.ones((1, candidates)), format="csr")
    result = scipy.optimize.linprog(
        table.cost_usd.ravel() / n, A_ub=-table.score.reshape(1, -1) / n, b_ub=[-tau], A_eq=sums, b_eq=np.ones(n),
        method="highs",
    )  # fmt: skip
    return float(result.fun) if result.success else float("nan")


@pytest.mark.parametrize("seed", range(40))
def test_cost_at_accuracy_is_the_best_mixture(seed: int) -> None:
    random = np.random.default_rng(seed)
    policies = int(random.integers(1, 9))
    # coarse values make ties in accuracy and in cost
    accuracy, cost = random.integers(0, 11, policies) / 10, random.integers(1, 8, policies) / 4
    for tau in (0.0, 0.1, 0.35, 0.5, 0.77, 0.9, 1.0, float(accuracy.max())):
        expected = mixture_lp(accuracy, cost, tau)
        assert cost_at_accuracy(accuracy, cost, tau) == pytest.approx(expected, rel=1e-9, nan_ok=True)


def test_the_hull_is_that_of_the_fixed_candidates() -> None:
    table = synthetic.outcome_table(300, graded=True)
    accuracy, cost = table.score.mean(axis=0), table.cost_usd.mean(axis=0)
    taus = np.linspace(0.0, accuracy.max(), 25)
    expected = [mixture_lp(accuracy, cost, tau) for tau in taus]
    assert [hull_cost(table, tau) for tau in taus] == pytest.approx(expected, rel=1e-9)
    assert np.isnan(hull_cost(table, float(accuracy.max()) + 1e-9))
    assert fixed_curve(table).costs(taus, table) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("graded", [False, True])
def test_the_oracle_is_the_linear_programme(graded: bool) -> None:
    table = synthetic.outcome_table(120, seed=5, graded=graded)
    most = float(table.score.max(axis=1).mean())
    for tau in (0.0, 0.3, 0.6, 0.83, most - 1e-3, most):
        # the solver keeps constraints to 1e-7, which at the very end is a few parts in a million of the cost
        assert oracle_cost(table, tau) == pytest.approx(assignment_lp(table, tau), rel=1e-5), tau
    assert np.isnan(oracle_cost(table, most + 1e-6))


def test_the_oracle_at_the_ends_of_its_range() -> None:
    table = synthetic.outcome_table(200)
    assert oracle_cost(table, 0.0) == pytest.approx(table.cost_usd.min(axis=1).mean(), rel=1e-12)
    # everything that can be right has to be: the cheapest right candidate, or the cheapest of all
    right = np.where(table.score == 1.0, table.cost_usd, np.inf).min(axis=1)
    everything = np.where(np.isinf(right), table.cost_usd.min(axis=1), right).mean()
    assert oracle_cost(table, float(table.score.max(axis=1).mean())) == pytest.approx(everything, rel=1e-9)


@pytest.mark.parametrize("name", TABLES)
def test_the_oracle_on_the_real_tables(data_dir: Path, name: str) -> None:
    table = read_table(data_dir / name / "test.parquet").take(np.arange(300))
    most = float(table.score.max(axis=1).mean())
    for tau in (0.75 * most, 0.97 * most):
        assert oracle_cost(table, tau) == pytest.approx(assignment_lp(table, tau), rel=1e-5)
    assert oracle_cost(table, 0.8 * most) <= hull_cost(table, 0.8 * most) or np.isnan(hull_cost(table, 0.8 * most))


@pytest.mark.parametrize("name", TABLES)
def test_candidates_of_the_real_tables_find_the_same_questions_hard(data_dir: Path, name: str) -> None:
    """Or their oracle would not be worth looking at."""
    assert median_correlation(read_table(data_dir / name / "train.parquet").score) > 0.1


def test_shuffled_columns_show_in_the_correlation() -> None:
    table = synthetic.outcome_table(3000)
    random = np.random.default_rng(0)
    shuffled = np.stack([random.permutation(column) for column in table.score.T], axis=1)
    assert median_correlation(table.score) > 0.1
    assert abs(median_correlation(shuffled)) < 0.05
    constant = np.column_stack([np.ones(9), np.zeros(9), np.arange(9) % 2])
    assert np.isnan(median_correlation(constant))


def test_relative_targets_span_cheapest_to_best() -> None:
    targets = relative_targets(np.array([0.9, 0.5, 0.7]), np.array([3.0, 1.0, 2.0]), (0.0, 0.25, 1.0))
    assert targets == pytest.approx([0.5, 0.6, 0.9])


def test_a_curve_is_what_its_rule_gets() -> None:
    table = synthetic.outcome_table(150, seed=2)
    p = np.clip(table.score + np.random.default_rng(0).normal(0, 0.4, table.score.shape), 0, 1)
    price = table.cost_usd.mean(axis=0)
    curve = plug_in_curve(p, price, table)
    first, last = realised(table, p.argmax(axis=1)), realised(table, np.full(150, price.argmin()))
    for row, expected in ((0, first), (-1, last)):
        assert curve.score[row].mean() == pytest.approx(expected[0], rel=1e-5)
        assert curve.cost_usd[row].mean() == pytest.approx(expected[1], rel=1e-5)


def test_costs_of_an_unreached_target_are_those_of_the_best_fixed_candidate() -> None:
    table = synthetic.outcome_table(200)
    nothing_known = np.zeros_like(table.score)
    curve = plug_in_curve(nothing_known, table.cost_usd.mean(axis=0), table)
    best = table.cost_usd[:, table.score.mean(axis=0).argmax()].mean()
    assert curve.costs(np.array([0.99]), table) == pytest.approx([best])


def test_counts_weigh_rows_as_if_they_were_repeated() -> None:
    table = synthetic.outcome_table(100, graded=True)
    price = table.cost_usd.mean(axis=0)
    rows = np.random.default_rng(0).integers(0, 100, 100)
    taus = np.array([0.6, 0.7])
    p = table.score * 0.5 + 0.2
    repeated = table.take(rows)
    expected = plug_in_curve(p[rows], price, repeated).costs(taus, repeated)
    counts = np.bincount(rows, minlength=100).astype(np.float64)
    assert plug_in_curve(p, price, table).costs(taus, table, counts) == pytest.approx(expected, rel=1e-5)


def test_better_predictions_cost_less() -> None:
    table = synthetic.outcome_table(1500)
    price = table.cost_usd.mean(axis=0)
    skill = synthetic.SKILL[[synthetic.TOPICS.index(task) for task in table.tasks]]
    noisy = np.clip(skill + np.random.default_rng(0).normal(0, 0.3, skill.shape), 0, 1)
    assert selection_cost(skill, price, table) < 0.8 * selection_cost(noisy, price, table)


def test_the_bootstrap_is_paired() -> None:
    table = synthetic.outcome_table(400)
    price = table.cost_usd.mean(axis=0)
    taus = relative_targets(table.score.mean(axis=0), price, SELECTION_TARGETS)
    curve = plug_in_curve(0.7 * table.score, price, table)
    fixed = fixed_curve(table)
    assert np.array_equal(bootstrap_log_ratio(curve, curve, table, taus, 20, seed=0), np.zeros(20))
    ratios = bootstrap_log_ratio(curve, fixed, table, taus, 20, seed=0)
    parts = [bootstrap_costs(one, table, taus, 20, seed=0) for one in (curve, fixed)]
    assert ratios == pytest.approx(np.log(parts[0] / parts[1]).mean(axis=1))
    assert ratios.max() < 0.0
    assert ratios.std() > 0.0


def test_steps_are_those_that_are_counted_and_served(router: Router, test_table: OutcomeTable) -> None:
    x = router.encode(test_table.prompts)
    choice = router.snapshot.choose_path(x, "dual")
    u = _core.row_hash(x, router.certificate.key)
    steps = step_choices(choice, u)
    outcome = round_scores(test_table.score, 0)
    path, table = router.certificate.paths["dual"].path, router.certificate.tables["dual"]["certified"]
    right = outcome[np.arange(len(test_table)), steps].sum(axis=1)
    assert np.array_equal(right, count_successes(path, choice, outcome, u))
    for tau in (0.6, 0.7, 0.75):
        code = int(table.code[tau_index(tau)])
        assert np.array_equal(router.route_batch(x, tau).choice, steps[code])


def test_the_leak_limit_is_half_way_to_the_oracle() -> None:
    score = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    table = OutcomeTable("t", ("a", "b", "c", "d"), (), ("x", "y"), score, np.ones_like(score))
    assert leak_limit(table) == pytest.approx(0.5 + 0.5 * (0.75 - 0.5))


def test_joined_splits_have_the_mean_of_their_rows(folder: Path) -> None:
    val, test = (read_table(folder / f"{split}.parquet") for split in ("val", "test"))
    both = concatenate(val, test)
    score = (val.score.sum(axis=0) + test.score.sum(axis=0)) / len(both)
    assert both.score.mean(axis=0) == pytest.approx(score)
