"""Distillation: the hash encoder learns from a teacher that also reads texts with a transformer.

The teacher is kernel ridge regression on ``k_hash + share exp(-decay |z - z'|^2)``: the inner product of the hashed
features, and a radial kernel of the frozen transformer's embeddings z, of unit norm. The student regresses on
``(1 - w) label + w teacher``, in all components of the scores or only in the first, the difficulty of a query. Ridge
regression is linear in its target, so that is ``1 - w`` times the closed form of the labels and ``w`` times one of the
teacher's predictions, which bear a smaller penalty: they have none of the labels' noise. Prompts without labels are
further rows of the second.

No prediction has seen a label that it is judged by: the teacher's of a row is by a model of other folds, and where the
student is watched on a held-out fold, by one that has not seen that fold either.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from proteus_fast.evaluation.links import Link, through_link
from proteus_fast.evaluation.outcomes import FOLDS, read_parquet
from proteus_fast.training.crossfit import CrossFit, cross_fit, solve_columns
from proteus_fast.training.predictor import (
    Float32,
    FloatArray,
    Shrinkage,
    fit_shrinkages,
    solve_duals,
)

KERNELS = ((0.5, 2.0), (1.0, 1.0), (2.0, 0.5))
"""Share and decay of the radial kernel that are tried."""

TEACHER_ALPHAS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Penalties of the teacher that are tried, see ``fit_shrinkages``."""

STUDENT_ALPHAS = (0.0625, 0.25, 1.0)
"""Penalties that are tried for the regression on the teacher, as multiples of the features' squared norm."""

WEIGHTS = (0.15, 0.3, 0.5, 0.7)
"""Weights w of the teacher that are tried."""

COMPONENTS = (1, None)
"""How many of the scores' leading components the teacher has a say in; None: all."""

NEARLY_BEST = 1.05
"""Labels alone have to do nearly as well as the best for a setting to be tried with a teacher."""

MOST_ROWS = 16_384
"""Rows with and without labels at most: the regression keeps a few matrices of their squared number of floats."""

UNLABELLED = -1
"""Fold of a row that has no labels: it is never held out."""


def read_prompts(path: str | os.PathLike[str], known: Sequence[str]) -> tuple[str, ...]:
    """Distinct prompts of a Parquet file's column ``prompt``, those that are known left out, white space apart.

    Raises:
        FileNotFoundError: no such file. ValueError: not a Parquet file with texts in such a column.
    """
    file = Path(path)
    table = read_parquet(file, "unlabelled", ["prompt"])
    values = table["prompt"].to_pylist() if table.column_names == ["prompt"] else [None]
    prompts = [value for value in values if isinstance(value, str)]
    if len(prompts) < len(values):
        raise ValueError(f"unlabelled: expected a column prompt of texts in {file}, got none or others")
    seen = {prompt.strip() for prompt in known}
    return tuple({prompt.strip(): prompt for prompt in prompts if prompt.strip() not in seen}.values())


class Teacher:
    """A fitted teacher, whose predictions are made for what may not be seen.

    Attributes:
        share, decay: of the radial kernel. shrinkage: penalties of the score's components, and predictions out of fold.
    """

    def __init__(
        self, hash_kernel: Float32, h: Float32, score: FloatArray, fold: NDArray[np.int64],
        kernels: Sequence[tuple[float, float]] = KERNELS, alphas: Sequence[float] = TEACHER_ALPHAS,
    ) -> None:  # fmt: skip
        """Fit; the kernel and the penalties with the least squared error out of fold.

        Args:
            hash_kernel: inner products of the hashed features, scaled to squared norms of at most 1: of all m rows,
                first the n with labels, with those n, (m, n). h: the transformer's embeddings, (m, D). score: labels,
                (n, K). fold: (n,).
        """
        n = len(score)
        z = h / np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-12)
        squared_distance = np.maximum(2.0 - 2.0 * (z @ z[:n].T), 0.0)
        least = np.inf
        for share, decay in kernels:
            kernel = hash_kernel + np.float32(share) * np.exp(np.float32(-decay) * squared_distance)
            found = fit_shrinkages(kernel[:n], score, fold, alphas, ("each+0",))["each+0"]
            if found.error < least:
                least, self._kernel, self.shrinkage = found.error, kernel, found
                self.share, self.decay = share, decay
        self._score = score
        self._fold = fold
        self._models: dict[frozenset[int], FloatArray] = {}

    def predict(self, unseen: frozenset[int] = frozenset()) -> FloatArray:
        """Predicted scores of all rows, (m, K), each by a model that saw neither the row's fold nor the unseen ones."""
        n = len(self._score)
        predicted = self._model(unseen).copy()
        for number in set(range(FOLDS)) - unseen:
            rows = np.flatnonzero(self._fold == number)
            predicted[rows] = self._model(unseen | {number})[rows]
        # what nobody may use
        predicted[:n][np.isin(self._fold, list(unseen))] = np.nan
        return predicted

    def _model(self, unseen: frozenset[int]) -> FloatArray:
        found = self._models.get(unseen)
        if found is None:
            n, seen = len(self._score), ~np.isin(self._fold, list(unseen))
            mean = self._score[seen].mean(axis=0)
            target = (self._score[seen] - mean) @ self.shrinkage.rotation
            dual = solve_columns(self._kernel[:n][np.ix_(seen, seen)], target, self.shrinkage.alpha)
            components = self._kernel[:, seen] @ dual.astype(np.float32)
            found = self._models[unseen] = components.astype(np.float64) @ self.shrinkage.rotation.T + mean
        return found


class Trial(NamedTuple):
    """A setting of the student that was tried, with what it costs out of fold, in USD."""

    variant: str
    link: Link
    components: int | None
    weight: float
    alpha: float
    cost_usd: float


@dataclass(frozen=True)
class Student:
    """The regression on labels and a teacher.

    Attributes:
        trial: the setting. p: linear out-of-fold predictions of the fit rows, (n, K). shrinkage: of the part that
            learns from labels. mixing: (K, K), predictions ``a`` by labels and ``b`` by the teacher, centred on the
            mean scores, make ``a + (b - a) mixing``. dual: of the part that learns from the teacher, of all rows,
            (m, K). teacher_mean: of the teacher's predictions, (K,).
    """

    trial: Trial
    p: FloatArray
    shrinkage: Shrinkage
    mixing: FloatArray
    dual: FloatArray
    teacher_mean: FloatArray


def _mixing(rotation: FloatArray, weight: float, components: int | None) -> FloatArray:
    leading = rotation[:, :components]
    return np.asarray(weight * (leading @ leading.T))


def fit_student(
    kernel: Float32,
    teacher: Teacher,
    score: FloatArray,
    fold: NDArray[np.int64],
    labelled: dict[str, Shrinkage],
    cost_of: Callable[[FloatArray], float],
    *,
    squared_norm: float,
    links: Sequence[Link],
    tick: Callable[[], None],
) -> tuple[Student, list[Trial]]:
    """The student with the least cost out of fold.

    Args:
        kernel: inner products of the hashed features of all m rows, the n labelled ones first, (m, m).
        score: labels, (n, K). fold: (m,), ``UNLABELLED`` where a row has none. labelled: the closed forms on labels, by
            variant. cost_of: of predictions. squared_norm: of the features. links: those that are tried.
        tick: called for each fold.

    Returns:
        The student, and everything that was tried.
    """
    n, mean_score = len(score), score.mean(axis=0)
    alphas = [alpha * squared_norm for alpha in STUDENT_ALPHAS]
    taught = [np.empty_like(score) for _ in alphas]
    for number in range(FOLDS):
        held = fold == number
        target = teacher.predict(frozenset({number}))[~held]
        mean = target.mean(axis=0)
        duals = solve_duals(kernel[np.ix_(~held, ~held)], (target - mean).astype(np.float32), alphas)
        for p, dual in zip(taught, duals, strict=True):
            p[held[:n]] = kernel[np.ix_(held, ~held)] @ dual + mean
        tick()
    alone = {
        (variant, link): cost_of(through_link(shrinkage.p, mean_score, link))
        for variant, shrinkage in labelled.items()
        for link in links
    }

    def mixed(variant: str, components: int | None, weight: float, p: FloatArray) -> FloatArray:
        own = labelled[variant]
        return np.asarray(own.p + (p - own.p) @ _mixing(own.rotation, weight, components))

    trials = [
        Trial(
            variant, link, components, weight, alpha,
            cost_of(through_link(mixed(variant, components, weight, p), mean_score, link)),
        )
        for variant, link in alone
        if alone[variant, link] <= NEARLY_BEST * min(alone.values())
        for components in COMPONENTS
        for weight in WEIGHTS
        for alpha, p in zip(alphas, taught, strict=True)
    ]  # fmt: skip
    best = min(trials, key=lambda trial: trial.cost_usd)
    target = teacher.predict()
    mean = target.mean(axis=0)
    taught_dual = solve_columns(kernel, target - mean, np.full(target.shape[1], best.alpha))
    own = labelled[best.variant]
    p = mixed(best.variant, best.components, best.weight, taught[alphas.index(best.alpha)])
    mixing = _mixing(own.rotation, best.weight, best.components)
    return Student(best, p, own, mixing, taught_dual, mean), trials


def cross_fit_student(kernel: Float32, teacher: Teacher, student: Student, fold: NDArray[np.int64]) -> CrossFit:
    """Predictions of the part that learns from the teacher, as ``cross_fit`` makes them, (m, K).

    Args:
        kernel: (m, m). fold: (m,), as in ``fit_student``.
    """
    alpha = np.full(len(student.teacher_mean), student.trial.alpha)
    return cross_fit(kernel, teacher.predict, alpha, fold)
