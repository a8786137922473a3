"""Gradient refinement of the closed form: the projection z = LN(GELU(W2 GELU(W1 h))) with a sigmoid predictor.

The network sees embeddings whose regression columns are out of fold, as in stacking (Wolpert 1992): in-sample ones
would look far more certain than those of a new query. It is kept only where it costs less out of fold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from proteus_fast.evaluation.outcomes import FOLDS

FloatArray = NDArray[np.float64]


class ProjectedPredictor(nn.Module):
    """Projection and predictor as the checkpoint holds them, on standardised embeddings."""

    def __init__(self, dim: int, width: int, mean_score: Tensor) -> None:
        super().__init__()
        self.lift = nn.Linear(dim, width)
        self.mix = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(mean_score))
        with torch.no_grad():
            self.head.bias.copy_(torch.logit(mean_score.clamp(0.02, 0.98)))
            self.head.weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of predicted accuracy, (B, K), for embeddings (B, D)."""
        x = nn.functional.gelu(self.lift(x), approximate="tanh")
        x = nn.functional.gelu(self.mix(x), approximate="tanh")
        logits: Tensor = self.head(self.norm(x))
        return logits

    def tensors(self, mean: FloatArray, scale: FloatArray) -> dict[str, NDArray[np.float32]]:
        """Checkpoint tensors; standardisation (x - mean) / scale is folded into the first layer."""
        weight = self.lift.weight.detach().double().numpy().T / scale[:, None]
        bias = self.lift.bias.detach().double().numpy() - mean @ weight
        parts = {
            "projection.w1": weight,
            "projection.b1": bias,
            "projection.w2": self.mix.weight.detach().numpy().T,
            "projection.b2": self.mix.bias.detach().numpy(),
            "projection.ln_weight": self.norm.weight.detach().numpy(),
            "projection.ln_bias": self.norm.bias.detach().numpy(),
            "predictor.weight": self.head.weight.detach().numpy().T,
            "predictor.bias": self.head.bias.detach().numpy(),
        }
        return {name: np.ascontiguousarray(part, np.float32) for name, part in parts.items()}


@dataclass(frozen=True)
class Refinement:
    """A refinement that was tried.

    Attributes:
        p: out-of-fold predictions after the best number of epochs, (n, K). loss: mean held-out cross-entropy after
            each epoch, (E,). epochs: the best number. tensors: of the network trained that long on all rows.
    """

    p: FloatArray
    loss: FloatArray
    epochs: int
    tensors: dict[str, NDArray[np.float32]]


def _train(
    x: Tensor, y: Tensor, epochs: int, seed: int, width: int, watch: Callable[[ProjectedPredictor], None]
) -> ProjectedPredictor:
    torch.manual_seed(seed)
    model = ProjectedPredictor(x.shape[1], width, y.mean(dim=0))
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(len(x), generator=order).split(64):  # type: ignore[no-untyped-call]
            loss = nn.functional.binary_cross_entropy_with_logits(model(x[rows]), y[rows])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
        model.eval()
        watch(model)
    return model


def refine(
    h: NDArray[np.float32],
    score: FloatArray,
    fold: NDArray[np.int64],
    *,
    seed: int,
    width: int = 128,
    epochs: int = 12,
    progress: Callable[[], None] = lambda: None,
) -> Refinement:
    """Train projection and predictor by binary cross-entropy on graded scores, the number of epochs chosen out of fold.

    Args:
        h: embeddings with out-of-fold regression columns, (n, D). score: labels, (n, K). fold: (n,).
        seed: of weights and order. width: of the projection. epochs: at most. progress: called FOLDS + 1 times.
    """
    # batches of 64 rows are too small to share: a second thread makes them slower
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _refine(h, score, fold, seed, width, epochs, progress)
    finally:
        torch.set_num_threads(threads)


def _refine(
    h: NDArray[np.float32],
    score: FloatArray,
    fold: NDArray[np.int64],
    seed: int,
    width: int,
    epochs: int,
    progress: Callable[[], None],
) -> Refinement:
    mean = h.mean(axis=0, dtype=np.float64)
    scale = np.maximum(h.std(axis=0, dtype=np.float64), 1e-6)
    x = torch.from_numpy(((h - mean) / scale).astype(np.float32))
    y = torch.from_numpy(score.astype(np.float32))
    predicted = np.zeros((epochs, *score.shape))
    for number in range(FOLDS):
        held = torch.from_numpy(fold == number)
        seen: list[Tensor] = []

        def watch(model: ProjectedPredictor, held: Tensor = held, seen: list[Tensor] = seen) -> None:
            with torch.no_grad():
                seen.append(torch.sigmoid(model(x[held])))

        _train(x[~held], y[~held], epochs, seed, width, watch)
        predicted[:, fold == number] = torch.stack(seen).numpy()
        progress()
    clipped = predicted.clip(1e-4, 1 - 1e-4)
    loss = -(score * np.log(clipped) + (1 - score) * np.log(1 - clipped)).mean(axis=(1, 2))
    best = int(loss.argmin()) + 1
    model = _train(x, y, best, seed, width, lambda _: None)
    progress()
    return Refinement(predicted[best - 1], loss, best, model.tensors(mean, scale))
