"""Out-of-fold columns, plain and nested: right, and blind to the labels they are watched on."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from proteus_fast.evaluation.outcomes import FOLDS, OutcomeTable, fold_of
from proteus_fast.training import predictor
from proteus_fast.training.crossfit import (
    columns_of,
    cross_fit,
    fit_cost_alpha,
    log_cost_scale,
    solve_columns,
    to_scores,
)
from tests.evaluation import synthetic

BLOCK_WEIGHT = (1.0, 1.0, 1.0, 0.5)
SQUARED_NORM = float(np.square(BLOCK_WEIGHT).sum())


class Setting(NamedTuple):
    table: OutcomeTable
    fold: NDArray[np.int64]
    kernel: NDArray[np.float32]
    shrinkage: predictor.Shrinkage


@pytest.fixture(scope="module")
def setting() -> Setting:
    table = synthetic.outcome_table(500, seed=4)
    x = predictor.hash_features(table.prompts, 1 << 12).combined(BLOCK_WEIGHT)
    kernel, fold = predictor.gram(x, x), fold_of(table.prompts)
    shrinkage = predictor.fit_shrinkages(kernel, table.score, fold, (1.0, 4.0, 16.0), ["each+0"])["each+0"]
    return Setting(table, fold, kernel, shrinkage)


@pytest.mark.parametrize("changed", range(FOLDS))
def test_no_row_of_a_held_out_fold_is_told_its_labels(setting: Setting, changed: int) -> None:
    """With other labels in fold k, everything that a policy watched on fold k sees is the same to the bit."""
    _, fold, kernel, _ = setting
    target = np.random.default_rng(0).standard_normal((len(fold), 2))
    alpha = np.array([2.0, 8.0])
    other = target.copy()
    other[fold == changed] += np.random.default_rng(1).standard_normal((int((fold == changed).sum()), 2))
    first, second = cross_fit(kernel, target, alpha, fold), cross_fit(kernel, other, alpha, fold)
    assert np.array_equal(first.nested[changed], second.nested[changed])
    # nor does any row's prediction ever depend on its own fold
    own = fold == changed
    assert np.array_equal(first.nested[:, own], second.nested[:, own])
    assert np.array_equal(first.plain[own], second.plain[own])
    # the other rows were predicted from the changed labels
    assert (first.plain[~own] != second.plain[~own]).mean() > 0.99
    for k in set(range(FOLDS)) - {changed}:
        assert (first.nested[k][~own & (fold != k)] != second.nested[k][~own & (fold != k)]).mean() > 0.99


def test_plain_is_out_of_fold_ridge_and_the_diagonal_of_nested(setting: Setting) -> None:
    _, fold, kernel, _ = setting
    target = np.random.default_rng(2).standard_normal((len(fold), 3))
    crossed = cross_fit(kernel, target, np.array([2.0, 8.0, 2.0]), fold)
    two, eight = predictor.out_of_fold(kernel, target.astype(np.float32), fold, [2.0, 8.0])
    expected = np.stack([two[:, 0], eight[:, 1], two[:, 2]], axis=1)
    np.testing.assert_allclose(crossed.plain, expected, rtol=0, atol=1e-4)
    assert crossed.nested.shape == (FOLDS, *target.shape)
    for k in range(FOLDS):
        assert np.array_equal(crossed.nested[k][fold == k], crossed.plain[fold == k])


def test_nested_is_ridge_without_both_folds(setting: Setting) -> None:
    _, fold, kernel, _ = setting
    target = np.random.default_rng(3).standard_normal((len(fold), 1))
    nested = cross_fit(kernel, target, np.array([4.0]), fold).nested
    for own, held in ((0, 3), (3, 0), (4, 1)):
        rest, rows = (fold != own) & (fold != held), fold == own
        mean = target[rest].mean()
        system = kernel[np.ix_(rest, rest)].astype(np.float64) + 4.0 * np.eye(int(rest.sum()))
        expected = kernel[np.ix_(rows, rest)] @ np.linalg.solve(system, target[rest] - mean) + mean
        np.testing.assert_allclose(nested[held][rows], expected, rtol=0, atol=1e-3)


def test_an_infinite_penalty_predicts_zero(setting: Setting) -> None:
    _, fold, kernel, _ = setting
    target = np.random.default_rng(5).standard_normal((len(fold), 2)) + 3.0
    crossed = cross_fit(kernel, target, np.array([np.inf, 2.0]), fold)
    assert not crossed.plain[:, 0].any()
    assert not crossed.nested[..., 0].any()
    alone = cross_fit(kernel, target[:, 1:], np.array([2.0]), fold)
    np.testing.assert_allclose(crossed.nested[..., 1:], alone.nested, rtol=0, atol=1e-6)
    assert not solve_columns(kernel, target, np.array([np.inf, np.inf])).any()


def test_columns_and_scores_are_each_other_s_inverse(setting: Setting) -> None:
    table, _, _, shrinkage = setting
    scale = log_cost_scale(table)
    target, alpha = columns_of(table.score, scale, shrinkage, 7.0)
    candidates = len(table.candidates)
    assert target.shape == (len(table), candidates + 1)
    assert alpha[-1] == 7.0
    assert np.array_equal(alpha[:-1], shrinkage.alpha)
    back = to_scores(target, shrinkage)
    np.testing.assert_allclose(back[:, :-1], table.score - table.score.mean(axis=0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(back[:, -1:], scale - scale.mean(), rtol=0, atol=1e-12)
    nested = np.stack([target, 2.0 * target])
    np.testing.assert_allclose(to_scores(nested, shrinkage), np.stack([back, 2.0 * back]), rtol=0, atol=1e-12)


def test_plain_scores_are_those_of_the_search(setting: Setting) -> None:
    table, fold, kernel, shrinkage = setting
    target, alpha = columns_of(table.score, log_cost_scale(table), shrinkage, 4.0)
    plain = to_scores(cross_fit(kernel, target, alpha, fold).plain, shrinkage)[:, :-1] + table.score.mean(axis=0)
    np.testing.assert_allclose(plain, shrinkage.p, rtol=0, atol=1e-4)


def test_nested_scores_stay_blind_through_centring_and_rotation(setting: Setting) -> None:
    """Scores are centred and rotated with all labels at hand: both cancel where every penalty is finite."""
    table, fold, kernel, found = setting
    shrinkage = replace(found, alpha=np.full(len(found.alpha), 4.0))
    scale = log_cost_scale(table)
    other = np.where((fold == 1)[:, None], 1.0 - table.score, table.score)
    seen = []
    for score in (table.score, other):
        target, alpha = columns_of(score, scale, shrinkage, 4.0)
        nested = to_scores(cross_fit(kernel, target, alpha, fold).nested, shrinkage)
        seen.append(nested[..., :-1] + score.mean(axis=0))
    np.testing.assert_allclose(seen[0][1], seen[1][1], rtol=0, atol=1e-4)
    assert np.abs(seen[0][2] - seen[1][2]).max() > 0.05


def test_the_cost_column_finds_prompts_that_are_dear(setting: Setting) -> None:
    table, fold, kernel, _ = setting
    _, explained = fit_cost_alpha(kernel, log_cost_scale(table), fold, SQUARED_NORM)
    # the lengths of this table are drawn without a look at the prompt
    assert explained < 0.05
    long = np.array([4.0 if task in ("proofs", "code") else 0.5 for task in table.tasks])
    dear = replace(table, cost_usd=table.cost_usd * long[:, None])
    scale = log_cost_scale(dear)
    alpha, explained = fit_cost_alpha(kernel, scale, fold, SQUARED_NORM)
    assert explained > 0.6
    guess = cross_fit(kernel, scale - scale.mean(), np.array([alpha]), fold).plain
    assert 1.0 - ((guess - scale + scale.mean()) ** 2).mean() / scale.var() == pytest.approx(explained, abs=1e-3)


def test_the_cost_scale_is_relative_and_finite() -> None:
    table = synthetic.outcome_table(50, seed=6)
    scale = log_cost_scale(table)
    assert scale.shape == (50, 1)
    np.testing.assert_allclose(log_cost_scale(replace(table, cost_usd=1000.0 * table.cost_usd)), scale, atol=1e-12)
    # a query twice as dear for every candidate is log 2 above itself, beside what it adds to the means
    double = table.cost_usd.copy()
    double[0] *= 2.0
    moved = log_cost_scale(replace(table, cost_usd=double)) - scale
    np.testing.assert_allclose(moved[0] - moved[1], np.log(2.0), atol=1e-12)
    free = table.cost_usd.copy()
    free[:, 0] = 0.0
    free[3] = 0.0
    assert np.isfinite(log_cost_scale(replace(table, cost_usd=free))).all()
    assert np.ptp(log_cost_scale(replace(table, cost_usd=np.zeros_like(free)))) < 1e-12
