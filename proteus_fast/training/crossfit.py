"""Rows for stage 2: predictions that no row's own label has shaped, also inside held-out folds.

Five-fold predictions are enough to train the policy on all fit rows. They are not enough to choose anything about it
out of fold: the prediction of a row in fold j was made with the labels of fold k, so a policy trained on folds other
than k and watched on fold k would know, in reverse, the labels it is watched on (on zeroeval and routerbench this made
a policy that saves 5 % on new rows look 5 % too dear). So for every held-out fold k its training rows get predictions
of models that saw neither their own fold nor k: ten more closed-form solutions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from proteus_fast.evaluation.outcomes import FOLDS, OutcomeTable
from proteus_fast.training.predictor import Float32, FloatArray, Shrinkage, out_of_fold, solve_duals

COST_ALPHAS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Ridge penalties tried for the cost column, as multiples of the features' squared norm."""

_LEAST_COST = 1e-12


def log_cost_scale(table: OutcomeTable) -> FloatArray:
    """How dear a query is for all candidates together: mean_i log(cost_i / mean cost_i), (n, 1)."""
    price = np.maximum(table.cost_usd.mean(axis=0), _LEAST_COST)
    ratio = np.maximum(table.cost_usd, 1e-3 * price) / price
    return np.asarray(np.log(ratio).mean(axis=1, keepdims=True))


def fit_cost_alpha(
    kernel: Float32, scale: FloatArray, fold: NDArray[np.int64], squared_norm: float
) -> tuple[float, float]:
    """Penalty of the cost column with the least out-of-fold squared error, and the share of variance it explains."""
    alphas = [alpha * squared_norm for alpha in COST_ALPHAS]
    tried = out_of_fold(kernel, scale.astype(np.float32), fold, alphas)
    errors = [float(((guess - scale) ** 2).mean()) for guess in tried]
    best = int(np.argmin(errors))
    return alphas[best], 1.0 - errors[best] / max(float(scale.var()), 1e-300)


def solve_columns(kernel: Float32, target: FloatArray, alpha: FloatArray) -> FloatArray:
    """Dual coefficients of centred columns, each under its own penalty, (n, C); zero where that is infinite."""
    dual = np.zeros_like(target)
    for value in np.unique(alpha[np.isfinite(alpha)]):
        columns = alpha == value
        dual[:, columns] = solve_duals(kernel, target[:, columns].astype(np.float32), [float(value)])[0]
    return dual


@dataclass(frozen=True)
class CrossFit:
    """Out-of-fold predictions of C columns.

    Attributes:
        plain: every row by models of the other folds, (n, C). nested: entry k has rows of fold k by models of the other
            folds, and rows of any fold j by models that saw neither j nor k, (FOLDS, n, C).
    """

    plain: FloatArray
    nested: FloatArray


def cross_fit(
    kernel: Float32,
    target: FloatArray | Callable[[frozenset[int]], FloatArray],
    alpha: FloatArray,
    fold: NDArray[np.int64],
) -> CrossFit:
    """Ridge predictions of columns under fixed penalties, plain and nested.

    Args:
        kernel: inner products of the features, (n, n). target: (n, C), or a function that makes it where the labels of
            some folds may not be seen. alpha: (C,); infinite: predicts zero. fold: (n,); a row of no fold is never held
            out.
    """
    plain = np.zeros((len(fold), len(alpha)))
    nested = np.zeros((FOLDS, *plain.shape))
    live = np.isfinite(alpha)
    for j in range(FOLDS):
        for k in range(j, FOLDS):
            rest = (fold != j) & (fold != k)
            known = (target(frozenset({j, k})) if callable(target) else target)[rest]
            mean = known.mean(axis=0)
            dual = solve_columns(kernel[np.ix_(rest, rest)], known - mean, alpha)
            for own, other in ((j, k), (k, j)):
                rows = fold == own
                guess = np.where(live, kernel[np.ix_(rows, rest)] @ dual + mean, 0.0)
                nested[other][rows] = guess
                if j == k:
                    plain[rows] = guess
    return CrossFit(plain, nested)


def columns_of(
    score: FloatArray, scale: FloatArray, shrinkage: Shrinkage, cost_alpha: float
) -> tuple[FloatArray, FloatArray]:
    """Targets of the regression, components of the centred scores and the centred cost scale, with their penalties."""
    centred = (score - score.mean(axis=0)) @ shrinkage.rotation
    target = np.concatenate([centred, scale - scale.mean(axis=0)], axis=1)
    return target, np.concatenate([shrinkage.alpha, [cost_alpha]])


def to_scores(columns: FloatArray, shrinkage: Shrinkage) -> FloatArray:
    """Predicted columns (..., C + 1) as centred scores and cost scale, (..., K + 1)."""
    return np.concatenate([columns[..., :-1] @ shrinkage.rotation.T, columns[..., -1:]], axis=-1)
