"""What a learned router has to beat.

Text baselines predict the accuracy of every candidate, as ours does, and differ in nothing else: their settings are
chosen out of fold inside fit by the same criterion (``metrics.selection_cost``), 28 of them through both links (ours:
as many without a teacher, which no baseline has), and their predictions get the same path, calibration rows and
certificate (``training.calibrate.plug_in_checkpoint``). Vocabulary and document frequencies come from all fit prompts,
held-out folds included: they hold no label.

Beside them stand the best fixed candidate and three that are defined elsewhere:

- cheapest (``Pool.cheapest``): argmin_i of the mean cost on the fit rows;
- hull (``metrics.hull_cost``): the least cost of reaching tau with fixed candidates and mixtures of two of them,
  RouterBench's zero router (Hu et al. 2024, arXiv 2403.12031). It knows the evaluated rows, so it is a bound on what
  fixed candidates can do, and no router;
- oracle (``metrics.oracle_cost``), which knows them too: min mean_x c(x, a(x)) subject to mean_x y(x, a(x)) >= tau over
  all mixed assignments a, a linear programme.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from proteus_fast.evaluation.links import LINKS, Link, through_link
from proteus_fast.evaluation.metrics import selection_cost
from proteus_fast.evaluation.outcomes import FOLDS, Division, OutcomeTable, fold_of
from proteus_fast.router import Router

Float32 = NDArray[np.float32]
FloatArray = NDArray[np.float64]

MIN_DOCUMENTS = (1, 2, 5, 20)
"""Least number of prompts that a term must be in, as tried."""
NEIGHBOURS = (10, 20, 40, 80, 160, 320, 640)
ALPHAS = (64.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0)
"""Ridge penalties tried, in the order in which one solution starts the next."""

_CHUNK = 512
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Vectors:
    """TF-IDF vectors of the fit prompts under one vocabulary.

    Attributes:
        min_documents: least number of prompts that a term is in. x: (n, terms) sparse, rows of unit norm or zero.
        of: vectors of any texts, (m, terms).
    """

    min_documents: int
    x: scipy.sparse.csr_matrix
    of: Callable[[Sequence[str]], scipy.sparse.csr_matrix]


def tfidf(prompts: Sequence[str]) -> tuple[Vectors, ...]:
    """Word 1-2-grams with sublinear counts and inverse document frequencies, for each of ``MIN_DOCUMENTS``.

    Raises:
        ValueError: no prompt has a word.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    found = []
    for least in MIN_DOCUMENTS:
        if least > 1 and least > len(prompts):
            continue
        # any run of word characters is a word, so that no prompt of single letters or digits is left without one
        vectoriser = TfidfVectorizer(
            ngram_range=(1, 2), sublinear_tf=True, min_df=least, token_pattern=r"(?u)\w+", dtype=np.float32
        )
        try:
            found.append(Vectors(least, vectoriser.fit_transform(prompts).tocsr(), vectoriser.transform))
        except ValueError:
            # no term is in that many prompts
            continue
    if not found:
        raise ValueError("prompts: expected at least one word, got none")
    return tuple(found)


@dataclass(frozen=True)
class Baseline:
    """A predictor of every candidate's accuracy, tuned inside fit.

    Attributes:
        name: ``knn`` or ``tfidf_ridge``. setting: what was chosen. link: what its predictions went through. cost_usd:
            its out-of-fold selection cost.
        p: its out-of-fold predictions on the fit rows, (n, K), in [0, 1]. predict: its predictions for m texts, (m, K).
    """

    name: str
    setting: Mapping[str, float]
    link: Link
    cost_usd: float
    p: FloatArray
    predict: Callable[[Sequence[str]], FloatArray]

    def certified(self, division: Division, *, delta: float, seed: int) -> Router:
        """The plug-in rule of these predictions, certified like ours; its rows are ``predict``'s, as float32.

        Args:
            division: with the fit rows that this was fitted on. delta, seed: as in the certificate to compare with.
        """
        from proteus_fast.training.calibrate import plug_in_checkpoint

        x = self.predict(division.calibration.prompts).astype(np.float32)
        return Router(plug_in_checkpoint(division.fit, self.p, division.calibration, x, delta=delta, seed=seed))


@dataclass(frozen=True)
class _Trial:
    vectors: Vectors
    value: float
    link: Link
    p: FloatArray
    cost_usd: float


def _cheapest_trial(fit: OutcomeTable, predictions: Iterator[tuple[Vectors, float, FloatArray]]) -> _Trial:
    price, mean = fit.cost_usd.mean(axis=0), fit.score.mean(axis=0)

    def trials() -> Iterator[_Trial]:
        for vectors, value, linear in predictions:
            for link in LINKS:
                p = through_link(linear, mean, link)
                yield _Trial(vectors, value, link, p, selection_cost(p, price, fit))

    return min(trials(), key=lambda trial: trial.cost_usd)


def _nearest(similarity: Float32, score: FloatArray, neighbours: Sequence[int]) -> list[FloatArray]:
    """Mean scores of the nearest rows for several numbers of neighbours, each (m, K).

    Args:
        similarity: of m texts to n rows, (m, n). score: of the rows, (n, K).
    """
    most = min(max(neighbours), len(score))
    index = np.argpartition(-similarity, most - 1, axis=1)[:, :most]
    order = np.argsort(-np.take_along_axis(similarity, index, axis=1), axis=1, kind="stable")
    total = score[np.take_along_axis(index, order, axis=1)].cumsum(axis=1)
    return [total[:, min(k, most) - 1] / min(k, most) for k in neighbours]


def _similarity(a: scipy.sparse.csr_matrix, b: scipy.sparse.csr_matrix) -> Float32:
    transposed = b.T.tocsr()
    parts = [(a[start : start + _CHUNK] @ transposed).toarray() for start in range(0, a.shape[0], _CHUNK)]
    return np.concatenate(parts)


def fit_knn(fit: OutcomeTable, vectors: Sequence[Vectors] | None = None) -> Baseline:
    """k nearest neighbours: p_i(x) = mean of y_i over the k fit prompts with the largest cosine of TF-IDF vectors.

    Hu et al. 2024 (RouterBench, arXiv 2403.12031), there on sentence embeddings. k and the vocabulary are chosen out of
    fold.
    """
    fold = fold_of(fit.prompts)

    def predictions() -> Iterator[tuple[Vectors, float, FloatArray]]:
        for one in vectors or tfidf(fit.prompts):
            similarity = _similarity(one.x, one.x)
            p = np.empty((len(NEIGHBOURS), *fit.score.shape))
            for number in np.unique(fold):
                held = fold == number
                rest = np.flatnonzero(~held)
                p[:, held] = _nearest(similarity[np.ix_(held, ~held)], fit.score[rest], NEIGHBOURS)
            for k, guess in zip(NEIGHBOURS, p, strict=True):
                yield one, k, guess

    best = _cheapest_trial(fit, predictions())
    k = int(best.value)

    def predict(texts: Sequence[str]) -> FloatArray:
        parts = []
        for start in range(0, len(texts), _CHUNK):
            similarity = _similarity(best.vectors.of(texts[start : start + _CHUNK]), best.vectors.x)
            parts += _nearest(similarity, fit.score, [k])
        return through_link(np.concatenate(parts), fit.score.mean(axis=0), best.link)

    setting = {"k": k, "min_documents": best.vectors.min_documents}
    return Baseline("knn", setting, best.link, best.cost_usd, best.p, predict)


def ridge_path(
    x: scipy.sparse.csr_matrix, y: FloatArray, alphas: Sequence[float]
) -> Iterator[tuple[float, Float32, Float32]]:
    """Ridge regression with an intercept for several penalties: minimise |y - Xw - b|^2 + alpha |w|^2.

    Solved in its dual, (H X X' H + alpha) d = H y with H = I - 11'/n, w = X'd, by conjugate gradients, each penalty
    starting where the last one ended.

    Args:
        x: (n, terms). y: (n, K). alphas: best from large to small.

    Yields:
        alpha, weights (terms, K), intercept (K,).
    """
    transposed = x.T.tocsr()
    mean = y.mean(axis=0)
    target = (y - mean).astype(np.float32)
    centre = np.asarray(x.mean(axis=0), np.float32).ravel()
    limit = _TOLERANCE * np.maximum(np.linalg.norm(target, axis=0), 1e-30)
    dual = np.zeros_like(target)

    def apply(d: Float32, alpha: float) -> Float32:
        product = x @ (transposed @ d)
        return np.asarray(product - product.mean(axis=0) + np.float32(alpha) * d)

    for alpha in alphas:
        residual = target - apply(dual, alpha)
        direction = residual.copy()
        square = (residual**2).sum(axis=0)
        for _ in range(1000):
            if (np.sqrt(square) <= limit).all():
                break
            moved = apply(direction, alpha)
            step = square / np.maximum((direction * moved).sum(axis=0), 1e-30)
            dual += step * direction
            residual -= step * moved
            last, square = square, (residual**2).sum(axis=0)
            direction = residual + (square / np.maximum(last, 1e-30)) * direction
        weight = np.asarray(transposed @ dual)
        yield alpha, weight, (mean - centre @ weight).astype(np.float32)


def fit_tfidf_ridge(fit: OutcomeTable, vectors: Sequence[Vectors] | None = None) -> Baseline:
    """TF-IDF and ridge regression under CARROT's rule: p_i(x) = b_i + w_i'x, choice = argmax p_i - c_i/lambda.

    Somerstep et al. 2025 (CARROT, arXiv 2502.03261): regress the scores of all candidates, then plug in. Costs are the
    candidates' means, as for every router here. One penalty for all candidates, chosen out of fold with the vocabulary.
    """
    fold = fold_of(fit.prompts)

    def predictions() -> Iterator[tuple[Vectors, float, FloatArray]]:
        for one in vectors or tfidf(fit.prompts):
            p = np.empty((len(ALPHAS), *fit.score.shape))
            for number in range(FOLDS):
                held = fold == number
                solutions = ridge_path(one.x[~held], fit.score[~held], ALPHAS) if held.any() else ()
                for i, (_, weight, intercept) in enumerate(solutions):
                    p[i, held] = one.x[held] @ weight + intercept
            for alpha, guess in zip(ALPHAS, p, strict=True):
                yield one, alpha, guess

    best = _cheapest_trial(fit, predictions())
    # the same way through the penalties as in the folds
    ways = [alpha for alpha in ALPHAS if alpha >= best.value]
    *_, (_, weight, intercept) = ridge_path(best.vectors.x, fit.score, ways)

    def predict(texts: Sequence[str]) -> FloatArray:
        linear = np.asarray(best.vectors.of(texts) @ weight + intercept, np.float64)
        return through_link(linear, fit.score.mean(axis=0), best.link)

    setting = {"alpha": best.value, "min_documents": best.vectors.min_documents}
    return Baseline("tfidf_ridge", setting, best.link, best.cost_usd, best.p, predict)


def fit_text_baselines(fit: OutcomeTable, progress: Callable[[], Any] = lambda: None) -> tuple[Baseline, Baseline]:
    """kNN and TF-IDF + ridge on the same vectors. ``progress`` is called three times."""
    vectors = tfidf(fit.prompts)
    progress()
    knn = fit_knn(fit, vectors)
    progress()
    ridge = fit_tfidf_ridge(fit, vectors)
    progress()
    return knn, ridge


def best_fixed(calibration: OutcomeTable) -> int:
    """The candidate with the best mean score on the calibration rows: argmax_i mean_x y_i(x), lowest index on ties."""
    return int(np.argmax(calibration.score.mean(axis=0)))
