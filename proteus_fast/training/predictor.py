"""Hash encoder and predictor in closed form.

Scores are regressed on hashed features. The K score columns are rotated to their principal components and each
component is shrunk on its own, out of fold (a form of curds and whey, Breiman and Friedman 1997): what candidates
share, the difficulty of the query, is well determined, what tells them apart much less. The regression directions
become columns of the encoder's table, beside directions of a truncated SVD of the features, so that the predictor is
linear in the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from proteus_fast import _core
from proteus_fast.checkpoint import Array
from proteus_fast.evaluation.links import LINKS, Link, through_link
from proteus_fast.evaluation.outcomes import FOLDS

BLOCKS = 4
Float32 = NDArray[np.float32]
FloatArray = NDArray[np.float64]

ALPHAS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0)
"""Ridge penalties tried for every component, as multiples of the features' squared norm."""

_OTHER_COLUMNS = 6.0
_MOST_PASSES = 500

BLOCK_WEIGHTS = (
    (1.0, 1.0, 1.0, 0.0),
    (1.0, 1.0, 1.0, 0.5),
    (0.5, 0.5, 1.5, 0.5),
    (1.0, 1.0, 0.5, 0.0),
)
"""Weights of words, bigrams, character 4-grams and shape that are tried."""

VARIANTS = ("each+0", "each+1", "each+2", "each+3", "all@3", "all@4", "all@5")
"""Ways of choosing penalties that are tried, see ``fit_shrinkages``; with block weights and links, 56 trials."""

"""Links that are tried, see ``through_link``."""


@dataclass(frozen=True)
class Features:
    """Hashed features of n texts before their blocks are weighted.

    Attributes:
        blocks: words, bigrams, character 4-grams, shape; each (n, rows) sparse with rows of unit norm or zero.
        idf: inverse document frequency of every table row, (rows,).
    """

    blocks: tuple[scipy.sparse.csr_matrix, ...]
    idf: Float32

    def combined(self, block_weight: Sequence[float]) -> scipy.sparse.csr_matrix:
        """Weighted sum of the blocks, (n, rows)."""
        total = self.blocks[0] * block_weight[0]
        for block, weight in zip(self.blocks[1:], block_weight[1:], strict=True):
            total = total + block * weight
        return total.tocsr()


def hash_features(texts: Sequence[str], rows: int, idf: Float32 | None = None) -> Features:
    """Features of texts; the inverse document frequencies are theirs unless given.

    Args:
        texts: n texts. rows: rows of the table, a power of two. idf: (rows,), of the fit rows.
    """
    indptr, index, count, block = _core.hash_features(texts, rows)
    n = len(texts)
    owner = np.repeat(np.arange(n), np.diff(indptr))
    if idf is None:
        document = np.unique(owner * np.int64(rows) + index)
        frequency = np.bincount(document % rows, minlength=rows)
        idf = (np.log((1.0 + n) / (1.0 + frequency)) + 1.0).astype(np.float32)
    value = (1.0 + np.log(count.astype(np.float64))) * idf[index]
    blocks = []
    for number in range(BLOCKS):
        here = block == number
        norm = np.sqrt(np.bincount(owner[here], weights=value[here] ** 2, minlength=n))
        scaled = value[here] / np.maximum(norm, 1e-30)[owner[here]]
        blocks.append(scipy.sparse.csr_matrix((scaled, (owner[here], index[here])), shape=(n, rows)))
    return Features(tuple(blocks), idf)


def gram(a: scipy.sparse.csr_matrix, b: scipy.sparse.csr_matrix) -> Float32:
    """Inner products of the rows of two sparse matrices, dense float32."""
    return np.asarray((a @ b.T).toarray(), np.float32)


def solve_duals(kernel: Float32, target: Float32, alphas: Sequence[float]) -> list[Float32]:
    """Dual coefficients of ridge regression, (kernel + alpha I)^-1 target, for several penalties.

    By conjugate gradients on all columns of all penalties at once, so that every pass over the kernel is one matrix
    product; a column leaves when its residual is below 1e-5 of its target.

    Args:
        kernel: inner products of the features, (n, n). target: (n, C). alphas: A penalties, > 0.

    Returns:
        A arrays (n, C).
    """
    columns = target.shape[1]
    shift = np.repeat(np.asarray(alphas, np.float32), columns)
    solution = np.zeros((len(target), len(shift)), np.float32)
    residual = np.tile(target, (1, len(alphas)))
    direction = residual.copy()
    squared = np.einsum("ij,ij->j", residual, residual)
    enough = 1e-10 * squared
    live = np.flatnonzero(squared > 0.0)
    residual, direction, squared = residual[:, live], direction[:, live], squared[live]
    for _ in range(_MOST_PASSES):
        if not live.size:
            break
        product = kernel @ direction + shift[live] * direction
        step = squared / np.einsum("ij,ij->j", direction, product)
        solution[:, live] += step * direction
        residual -= step * product
        new = np.einsum("ij,ij->j", residual, residual)
        direction = residual + (new / squared) * direction
        left = new > enough[live]
        live, squared = live[left], new[left]
        residual, direction = residual[:, left], direction[:, left]
    return [solution[:, i * columns : (i + 1) * columns] for i in range(len(alphas))]


def out_of_fold(kernel: Float32, target: Float32, fold: NDArray[np.int64], alphas: Sequence[float]) -> list[Float32]:
    """Ridge predictions of every row by the model of the other folds, targets centred on those folds.

    Returns:
        (n, C) for every penalty.
    """
    predicted = [np.empty_like(target) for _ in alphas]
    for number in range(FOLDS):
        held = fold == number
        mean = target[~held].mean(axis=0)
        duals = solve_duals(kernel[np.ix_(~held, ~held)], target[~held] - mean, alphas)
        for values, dual in zip(predicted, duals, strict=True):
            values[held] = kernel[np.ix_(held, ~held)] @ dual + mean
    return predicted


@dataclass(frozen=True)
class Shrinkage:
    """Components of the scores and how strongly each is shrunk.

    Attributes:
        rotation: principal components of the centred scores, one a column, (K, min(n, K)).
        alpha: penalty of every component, (K,); infinity where the mean predicts it best.
        p: out-of-fold predictions of the scores, (n, K), not clipped.
        error: their mean squared error.
    """

    rotation: FloatArray
    alpha: FloatArray
    p: FloatArray
    error: float


def fit_shrinkages(
    kernel: Float32, score: FloatArray, fold: NDArray[np.int64], alphas: Sequence[float], variants: Sequence[str]
) -> dict[str, Shrinkage]:
    """Penalties for the principal components of the scores, chosen out of fold in several ways at the price of one.

    Args:
        kernel: inner products of the features, (n, n). score: labels, (n, K). fold: (n,).
        alphas: penalties tried, increasing. variants: ``each+S``: for each component the penalty with the least squared
            error, moved S places up the list (accuracy is a matter of differences between candidates, which squared
            error shrinks too little); ``all@I``: the I-th penalty for all components.

    Returns:
        The outcome of every variant, under its name.
    """
    mean = score.mean(axis=0)
    rotation = np.linalg.svd(score - mean, full_matrices=False)[2].T
    target = (score - mean) @ rotation
    target32 = target.astype(np.float32)
    tried = [guess.astype(np.float64) for guess in out_of_fold(kernel, target32, fold, alphas)]
    # the last entry of the list is a penalty without end: the mean
    tried.append(np.zeros_like(target))
    penalties = np.array([*alphas, np.inf])
    least = np.array([((guess - target) ** 2).mean(axis=0) for guess in tried]).argmin(axis=0)
    found = {}
    for variant in variants:
        number = int(variant.removeprefix("each+").removeprefix("all@"))
        if not 0 <= number < len(alphas):
            raise ValueError(f"variants: expected places on a list of {len(alphas)} penalties, got {variant!r}")
        each = variant.startswith("each+")
        chosen = np.minimum(least + number, len(alphas)) if each else np.full_like(least, number)
        components = np.stack([tried[i][:, k] for k, i in enumerate(chosen)], axis=1)
        p = components @ rotation.T + mean
        found[variant] = Shrinkage(rotation, penalties[chosen], p, float(((p - score) ** 2).mean()))
    return found


def fit_dual(kernel: Float32, score: FloatArray, shrinkage: Shrinkage) -> FloatArray:
    """Dual coefficients of the score columns under a chosen shrinkage, (n, K), for centred scores."""
    target = ((score - score.mean(axis=0)) @ shrinkage.rotation).astype(np.float32)
    dual = np.zeros_like(target)
    for alpha in np.unique(shrinkage.alpha[np.isfinite(shrinkage.alpha)]):
        columns = shrinkage.alpha == alpha
        dual[:, columns] = solve_duals(kernel, target[:, columns], [float(alpha)])[0]
    rotated: FloatArray = dual.astype(np.float64) @ shrinkage.rotation.T
    return rotated


@dataclass(frozen=True)
class HashPredictor:
    """A trained hash encoder with its predictor, linear but for the link, as a checkpoint holds them."""

    table: NDArray[np.int8]
    row_scale: Float32
    idf: Float32
    block_weight: tuple[float, ...]
    weight: Float32
    bias: Float32
    link: Link = "clip"

    def encode(self, texts: Sequence[str]) -> Float32:
        """Embeddings (n, D) by the engine's encoder of this table."""
        block_weight = np.array(self.block_weight, np.float32)
        return _core.HashEncoder(self.table, self.row_scale, self.idf, block_weight).encode(texts)

    def tensors(self) -> dict[str, Array]:
        """The encoder's tensors of a checkpoint."""
        return {"encoder.table": self.table, "encoder.row_scale": self.row_scale, "encoder.idf": self.idf}


def quantise(directions: FloatArray) -> tuple[NDArray[np.int8], Float32]:
    """Round rows of a table to int8 with one scale a row.

    Args:
        directions: (rows, D).

    Returns:
        table (rows, D) int8 and row_scale (rows,) float32, so that table * row_scale is near ``directions``.
    """
    largest = np.abs(directions).max(axis=1)
    scale = (largest / 127.0).astype(np.float32)
    safe = np.where(scale > 0, scale, 1.0)[:, None]
    return np.rint(directions / safe).clip(-127, 127).astype(np.int8), scale


def build_table(
    features: Features, block_weight: Sequence[float], dual: FloatArray, mean: FloatArray, dim: int, seed: int
) -> HashPredictor:
    """Lay regression and SVD directions into the columns of a table.

    Args:
        features: of the fit rows. dual: dual coefficients, (n, K). mean: of the scores, (K,). dim: D >= K; the columns
            beyond K are the leading right singular vectors of the features. seed: of the SVD's start vector.
    """
    x = features.combined(block_weight)
    candidates = dual.shape[1]
    regression = np.asarray(x.T @ dual)
    columns = [regression]
    extra = min(dim - candidates, min(x.shape) - 1)
    if extra > 0:
        start = np.random.default_rng(seed).standard_normal(min(x.shape))
        right = scipy.sparse.linalg.svds(x, k=extra, v0=start, return_singular_vectors="vh")[2]
        # svds leaves order and sign open: the largest entry of a direction is made positive
        right = right[::-1]
        right *= np.sign(right[np.arange(extra), np.abs(right).argmax(axis=1)])[:, None]
        columns.append(right.T)
    columns.append(np.zeros((x.shape[1], dim - candidates - max(extra, 0))))
    directions = np.concatenate(columns, axis=1)
    # columns of one size share a row's scale without loss, and the predictor's weight undoes it; the others are kept
    # smaller, so that they seldom set the scale on which the regression is rounded
    size = np.sqrt((directions**2).mean(axis=0))
    size[candidates:] *= _OTHER_COLUMNS
    size[size == 0.0] = 1.0
    table, row_scale = quantise(directions / size)
    weight = np.zeros((dim, candidates), np.float32)
    weight[np.arange(candidates), np.arange(candidates)] = size[:candidates]
    return HashPredictor(
        table, row_scale, features.idf, tuple(float(w) for w in block_weight), weight, mean.astype(np.float32)
    )


@dataclass(frozen=True)
class Trial:
    """One setting that was tried out of fold."""

    block_weight: tuple[float, ...]
    variant: str
    link: Link
    error: float
    cost_usd: float


def try_links(
    shrinkages: Mapping[str, Shrinkage], score: FloatArray, cost_of: Callable[[FloatArray], float],
    links: Sequence[Link], setting: tuple[float, ...] = (),
) -> tuple[list[Trial], Trial]:  # fmt: skip
    """Every shrinkage through every link, and the trial that costs least out of fold, the first of equals."""
    mean = score.mean(axis=0)
    trials = []
    for variant, shrinkage in shrinkages.items():
        for link in links:
            p = through_link(shrinkage.p, mean, link)
            trials.append(Trial(setting, variant, link, float(((p - score) ** 2).mean()), cost_of(p)))
    return trials, min(trials, key=lambda trial: trial.cost_usd)


def search(
    features: Features,
    score: FloatArray,
    fold: NDArray[np.int64],
    cost_of: Callable[[FloatArray], float],
    settings: Sequence[tuple[float, ...]] = BLOCK_WEIGHTS,
    alphas: Sequence[float] = ALPHAS,
    variants: Sequence[str] = VARIANTS,
    links: Sequence[Link] = LINKS,
) -> Iterator[tuple[list[Trial], Trial, Shrinkage]]:
    """Try block weights one by one, each with all variants of shrinkage and all links.

    Yields:
        For every block weight the trials, the one that costs least out of fold, and its shrinkage.
    """
    grams = [gram(block, block) for block in features.blocks]
    for setting in settings:
        kernel = np.zeros_like(grams[0])
        for weight, block in zip(setting, grams, strict=True):
            if weight:
                kernel += np.float32(weight**2) * block
        squared_norm = sum(weight**2 for weight in setting)
        found = fit_shrinkages(kernel, score, fold, [alpha * squared_norm for alpha in alphas], variants)
        trials, best = try_links(found, score, cost_of, links, setting)
        yield trials, best, found[best.variant]
