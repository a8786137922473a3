"""A predictor on a frozen transformer: its embeddings once, then ridge regression with the hash encoder's shrinkage."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from proteus_fast.arrays import to_numpy
from proteus_fast.checkpoint import Array
from proteus_fast.encoder import EncoderSource, TransformerEncoder
from proteus_fast.evaluation.links import LINKS, Link, linked_head, through_link
from proteus_fast.training.predictor import (
    Float32,
    FloatArray,
    Trial,
    fit_dual,
    fit_shrinkages,
    try_links,
)

_SAY_EVERY_S = 30.0
_KEEP_EVERY_S = 60.0
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FrozenPredictor:
    """A predictor on a transformer's embeddings, linear but for the link.

    Attributes:
        source: the transformer. embeddings: of the texts that training needs, by text. weight, bias: (D, K), (K,).
        link: see ``links.through_link``. block_weight: none, as the hash encoder alone has them.
    """

    source: EncoderSource
    embeddings: dict[str, Float32]
    weight: Float32
    bias: Float32
    link: Link = "clip"
    block_weight: tuple[float, ...] = ()

    def encode(self, texts: Sequence[str]) -> Float32:
        """Embeddings (n, D) of texts that were embedded before."""
        return np.stack([self.embeddings[text] for text in texts])

    def tensors(self) -> dict[str, Array]:
        """The encoder's tensors of a checkpoint: none, it is referred to."""
        return {}


def embeddings_key(source: EncoderSource, texts: Sequence[str]) -> str:
    """sha256 of everything that embeddings of texts depend on, the texts in their order."""
    digest = hashlib.sha256(f"{source.sha256} {source.max_tokens}".encode())
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def embed(
    source: EncoderSource,
    texts: Sequence[str],
    tick: Callable[[], None],
    device: str = "cpu",
    *,
    begun: Float32 | None = None,
    keep: Callable[[Float32], object] | None = None,
) -> Float32:
    """Embeddings of texts, (n, D); ``tick`` is called for each hundredth, and a line is logged every half a minute.

    Args:
        begun: embeddings of the first texts, as far as an earlier run came, (m, D). keep: given them every minute.
    """
    encoder = TransformerEncoder(source, device)
    found = [] if begun is None else [begun]
    done = 0 if begun is None else len(begun)
    start = said = kept = time.monotonic()
    for part in [part for part in np.array_split(np.arange(len(texts)), 100) if len(part)]:
        # what is kept ends with a part
        if part[0] >= done:
            rows = encoder.encode([texts[i] for i in part])
            found.append(to_numpy(rows, "embeddings", from_gpu=True))
        tick()
        now = time.monotonic()
        if now - said > _SAY_EVERY_S:
            said = now
            _logger.info("encoded %d of %d texts in %.0f s", part[-1] + 1, len(texts), now - start)
        if keep is not None and now - kept > _KEEP_EVERY_S:
            kept = now
            keep(np.concatenate(found))
    return np.concatenate(found)


@dataclass(frozen=True)
class FrozenFit:
    """A fitted head.

    Attributes:
        weight, bias: for raw embeddings, (D, K) and (K,), as the link wants them. link: through which they predict.
        p: out-of-fold predictions, (n, K). chosen: the trial that it is. trials: everything that was tried.
    """

    weight: Float32
    bias: Float32
    link: Link
    p: FloatArray
    chosen: Trial
    trials: list[Trial]


def fit_frozen(
    h: Float32,
    score: FloatArray,
    fold: NDArray[np.int64],
    cost_of: Callable[[FloatArray], float],
    alphas: Sequence[float],
    variants: Sequence[str],
    links: Sequence[Link] = LINKS,
) -> FrozenFit:
    """Ridge regression of the scores on standardised embeddings, its penalties and link chosen by cost out of fold.

    Args:
        h: embeddings of the fit rows, (n, D). score: labels, (n, K). fold: (n,). cost_of: of predictions (n, K).
        alphas: penalties tried, in units of an embedding's mean squared norm. variants: see ``fit_shrinkages``.
        links: see ``links.through_link``.
    """
    mean, mean_score = h.mean(axis=0, dtype=np.float64), score.mean(axis=0)
    scale = np.maximum(h.std(axis=0, dtype=np.float64), 1e-6) * np.sqrt(h.shape[1])
    x = ((h - mean) / scale).astype(np.float32)
    kernel = x @ x.T
    found = fit_shrinkages(kernel, score, fold, alphas, variants)
    trials, best = try_links(found, score, cost_of, links)
    weight = (x.T.astype(np.float64) @ fit_dual(kernel, score, found[best.variant])) / scale[:, None]
    head = linked_head(weight, mean_score - mean @ weight, mean_score, best.link)
    return FrozenFit(*head, best.link, through_link(found[best.variant].p, mean_score, best.link), best, trials)
