"""A predictor on a frozen transformer: its embeddings once, then ridge regression with the hash encoder's shrinkage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from proteus_fast.arrays import to_host
from proteus_fast.checkpoint import Array
from proteus_fast.encoder import EncoderSource, TransformerEncoder
from proteus_fast.training.predictor import Float32, FloatArray, Shrinkage, Trial, fit_dual, fit_shrinkages


@dataclass(frozen=True)
class FrozenPredictor:
    """A linear predictor on a transformer's embeddings.

    Attributes:
        source: the transformer. embeddings: of the texts that training needs, by text. weight, bias: (D, K), (K,).
        block_weight: none, as the hash encoder alone has them.
    """

    source: EncoderSource
    embeddings: dict[str, Float32]
    weight: Float32
    bias: Float32
    block_weight: tuple[float, ...] = ()

    def encode(self, texts: Sequence[str]) -> Float32:
        """Embeddings (n, D) of texts that were embedded before."""
        return np.stack([self.embeddings[text] for text in texts])

    def tensors(self) -> dict[str, Array]:
        """The encoder's tensors of a checkpoint: none, it is referred to."""
        return {}


def embed(source: EncoderSource, texts: Sequence[str], tick: Callable[[], None], device: str = "cpu") -> Float32:
    """Embeddings of texts, (n, D); ``tick`` is called for each hundredth of them."""
    encoder = TransformerEncoder(source, device)
    parts = [part for part in np.array_split(np.arange(len(texts)), 100) if len(part)]
    found = []
    for part in parts:
        found.append(to_host(encoder.encode([texts[i] for i in part])))
        tick()
    return np.concatenate(found)


def fit_frozen(
    h: Float32,
    score: FloatArray,
    fold: NDArray[np.int64],
    cost_of: Callable[[FloatArray], float],
    alphas: Sequence[float],
    variants: Sequence[str],
) -> tuple[Float32, Float32, Shrinkage, list[Trial]]:
    """Ridge regression of the scores on standardised embeddings, its penalties chosen by cost out of fold.

    Args:
        h: embeddings of the fit rows, (n, D). score: labels, (n, K). fold: (n,). cost_of: of predictions (n, K).
        alphas: penalties tried, in units of an embedding's mean squared norm. variants: see ``fit_shrinkages``.

    Returns:
        weight (D, K) and bias (K,) for raw embeddings, the shrinkage with its out-of-fold predictions, what was tried.
    """
    mean = h.mean(axis=0, dtype=np.float64)
    scale = np.maximum(h.std(axis=0, dtype=np.float64), 1e-6) * np.sqrt(h.shape[1])
    x = ((h - mean) / scale).astype(np.float32)
    kernel = x @ x.T
    found = fit_shrinkages(kernel, score, fold, alphas, variants)
    trials = [
        Trial((), variant, shrinkage.error, cost_of(np.clip(shrinkage.p, 0.0, 1.0)))
        for variant, shrinkage in found.items()
    ]
    chosen = found[min(trials, key=lambda trial: trial.cost_usd).variant]
    weight = (x.T.astype(np.float64) @ fit_dual(kernel, score, chosen)) / scale[:, None]
    bias = score.mean(axis=0) - mean @ weight
    return weight.astype(np.float32), bias.astype(np.float32), chosen, trials
