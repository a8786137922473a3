"""Full fine-tuning of a transformer: all of its weights, and a head of K logits on the mean of its last hidden states.

Four folds of the fit rows train it, the fifth is held out. The predictions of the held-out fold are used twice: their
loss picks the look at which the weights are kept, and then temperature, cost scale and path are laid through them. That
is a choice of one in a few looks on rows that no weight was fitted to, so they flatter the path a little;
the certificate does not rest on them, it comes from cal and val rows, which nothing has read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import scipy.optimize
import torch
from numpy.typing import NDArray

from proteus_fast.encoder import EncoderSource, check_source, describe, load_tokenizer
from proteus_fast.evaluation.metrics import (
    SELECTION_TARGETS,
    bootstrap_log_ratio,
    plug_in_curve,
    relative_targets,
    selection_cost,
)
from proteus_fast.evaluation.outcomes import FOLDS, Division, fold_of
from proteus_fast.training.distributed import from_first, is_distributed, is_first, own_share
from proteus_fast.training.frozen import FrozenPredictor, embed, embeddings_key, fit_frozen
from proteus_fast.training.predictor import Float32, FloatArray
from proteus_fast.training.stages import Stages
from proteus_fast.training.tuner import Tuner

HELD_OUT = FOLDS - 1
_LOOKS_AN_EPOCH = 2
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneConfig:
    """How a transformer is fine-tuned.

    Attributes:
        epochs: passes over the four folds at most. batch_size, accumulate: rows of a forward pass at most, and how many
            such batches make a step; a step is the same, up to rounding, whatever its rows are divided into.
        token_budget: padded tokens of a forward pass at most.
        learning_rate: of the head, by AdamW; a layer below has ``layer_decay`` times the rate of the one above it, the
            embeddings that of a layer below the lowest. weight_decay: of matrices; biases and norms have none.
        warm_up: share of the steps in which the rate rises; it falls to zero in the others, both linearly.
        gradient_clip: largest norm of a step's gradient.
        dropout: train with the encoder's own dropout. Off: a head is read from the embeddings that are served, in
            few passes that the held-out fold ends; and masks would tie the result to how a step is divided.
        precision: of the products, ``float32`` or ``bfloat16`` (autocast; weights and loss stay float32). None:
            bfloat16 on a GPU, else float32.
        patience: looks without a lower held-out loss, two an epoch, after which training ends.
    """

    epochs: int = 3
    batch_size: int = 32
    accumulate: int = 1
    token_budget: int = 1 << 14
    learning_rate: float = 1e-4
    layer_decay: float = 0.85
    weight_decay: float = 0.01
    warm_up: float = 0.1
    gradient_clip: float = 1.0
    dropout: bool = False
    precision: Literal["float32", "bfloat16"] | None = None
    patience: int = 3

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "token_budget", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "gradient_clip"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number above 0, got {getattr(self, name)}")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: expected a finite number of at least 0, got {self.weight_decay}")
        if not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(f"layer_decay: expected a number in (0, 1], got {self.layer_decay}")
        if not 0.0 <= self.warm_up < 1.0:
            raise ValueError(f"warm_up: expected a number in [0, 1), got {self.warm_up}")
        if self.precision not in (None, "float32", "bfloat16"):
            raise ValueError(f"precision: expected float32 or bfloat16, got {self.precision!r}")

    def on(self, device: str) -> FinetuneConfig:
        """The same with the precision that a device has by default."""
        return replace(self, precision=self.precision or ("bfloat16" if device == "cuda" else "float32"))


def look_count(config: FinetuneConfig) -> int:
    """Looks at the held-out fold at most, the one before the first step included."""
    return _LOOKS_AN_EPOCH * config.epochs + 1


def start_head(
    h: Float32, score: FloatArray, fold: NDArray[np.int64], cost_of: Callable[[FloatArray], float],
    alphas: Sequence[float], variants: Sequence[str],
) -> tuple[Float32, Float32]:  # fmt: skip
    """The frozen encoder's ridge regression as a head of logits.

    Args:
        h: embeddings by the encoder as it comes, (n, D). score, fold, cost_of, alphas, variants: see ``fit_frozen``.

    Returns:
        weight (D, K) and bias (K,).
    """
    found = fit_frozen(h, score, fold, cost_of, alphas, variants, links=("sigmoid",))
    return found.weight, found.bias


def fit_temperature(logits: FloatArray, score: FloatArray) -> float:
    """The number in [1/4, 4] by which logits (n, K) are divided for the least cross-entropy with scores (n, K)."""

    def loss(log_temperature: float) -> float:
        return cross_entropy(logits / np.exp(log_temperature), score)

    bound = math.log(4.0)
    return float(np.exp(scipy.optimize.minimize_scalar(loss, bounds=(-bound, bound), method="bounded").x))


def cross_entropy(logits: FloatArray, score: FloatArray) -> float:
    """Mean binary cross-entropy of graded scores, both (n, K)."""
    return float((np.logaddexp(0.0, logits) - score * logits).mean())


@dataclass(frozen=True)
class Finetuned:
    """A fine-tuned transformer that costs less than the frozen one.

    Attributes:
        predictor: its linear predictor of logits, over embeddings of the calibration rows. p: predictions of the
            held-out fold, (m, K). predicted: which fit rows those are, (n,).
    """

    predictor: FrozenPredictor
    p: FloatArray
    predicted: NDArray[np.bool_]


def finetune(
    frozen: FrozenPredictor,
    p: FloatArray,
    division: Division,
    config: FinetuneConfig,
    stages: Stages,
    *,
    alphas: Sequence[float],
    variants: Sequence[str],
    seed: int,
    device: str,
    tick: Callable[[str], None],
) -> Finetuned | None:
    """Fine-tune the transformer of a predictor and keep it where it costs less on the held-out fold.

    Every process of torch.distributed runs this, on a file system that all of them see.

    Args:
        frozen: what it starts from. p: out-of-fold predictions of the frozen encoder's best predictor, (n, K), those of
            the held-out fold by a fit on the other four. alphas, variants: of the regression that the head starts at.
        stages: keeps a finished training, and the state of an unfinished one at every look. tick: called
            ``look_count(config) + 200`` times at most.

    Returns:
        None where the frozen encoder costs less, or no step lowered the held-out loss.
    """
    config = config.on(device)
    fit = division.fit
    fold, price = fold_of(fit.prompts), fit.cost_usd.mean(axis=0)
    held = fold == HELD_OUT
    table, seen = fit.take(held), fit.take(~held)
    settings = json.dumps([asdict(config), seed, device], sort_keys=True)
    name = "finetune-" + hashlib.sha256(settings.encode()).hexdigest()[:12]
    with _deterministic(device):
        head = start_head(
            frozen.encode(seen.prompts), seen.score, fold[~held], lambda q: selection_cost(q, price, seen), alphas,
            variants,
        )  # fmt: skip
        directory = check_source(frozen.source)
        tokenizer = load_tokenizer(directory, frozen.source.max_tokens)
        ids, held_ids = ([text.ids for text in tokenizer.encode_batch(list(rows.prompts))] for rows in (seen, table))
        tuner = Tuner(directory, ids, seen.score, head, config, device=device, seed=seed)

        def look(step: int, logits: FloatArray) -> float:
            if not np.isfinite(logits).all():
                stages.log(stage="finetune", step=step, epoch=step / tuner.steps_per_epoch, diverged=True)
                return math.inf
            loss, cost = cross_entropy(logits, table.score), selection_cost(_sigmoid(logits), price, table)
            stages.log(stage="finetune", step=step, epoch=step / tuner.steps_per_epoch, loss=loss, cost_usd=cost)
            tick(f"finetune, held-out loss {loss:.4f}")
            return loss

        best = _train(tuner, held_ids, look, name, stages)
    source = frozen.source
    # the first process alone writes, and the others read what it wrote
    if is_first():
        tuner.take(best)
        tuner.write(directory, stages.folder / "encoder")
        source = replace(describe(stages.folder / "encoder", source.max_tokens)[0], held=True)
    source = from_first(source)
    weight, bias = (np.ascontiguousarray(best[f"model.head.{part}"].T) for part in ("weight", "bias"))

    def embedded(texts: Sequence[str], what: str) -> Float32:
        arrays = from_first(stages.load(f"{name}-{what}") if is_first() else None)
        key = embeddings_key(source, texts)
        if arrays is None or str(arrays["key"]) != key:
            h = _embed_together(source, texts, device, lambda: tick("embed"))
            arrays = stages.save(f"{name}-{what}", h=h, key=key)
        return arrays["h"]

    # by the encoder that serves, not by the forward pass of the training
    logits = embedded(table.prompts, "held").astype(np.float64) @ weight + bias
    temperature = fit_temperature(logits, table.score)
    tuned = _sigmoid(logits / temperature)
    costs = [selection_cost(q, price, table) for q in (tuned, p[held])]
    taus = relative_targets(table.score.mean(axis=0), price, SELECTION_TARGETS)
    curves = [plug_in_curve(q, price, table) for q in (tuned, p[held])]
    ratios = bootstrap_log_ratio(curves[0], curves[1], table, taus, draws=200, seed=seed)
    # where no step lowered the loss there is nothing to hold
    kept = costs[0] < costs[1] and int(best["step"]) > 0
    stages.log(
        stage="finetune selected", kept=kept, step=int(best["step"]), temperature=temperature,
        cost_usd=costs[0], frozen_cost_usd=costs[1], share_of_resamples_cheaper=float((ratios < 0).mean()),
        loss_calibrated=cross_entropy(logits / temperature, table.score),
        frozen_loss=cross_entropy(_logit(p[held]), table.score), rows=len(table),
    )  # fmt: skip
    if not kept:
        if is_first():
            shutil.rmtree(source.directory)
            _logger.warning(
                "the checkpoint has the frozen encoder: on the held-out fold it costs %.4g USD a query, the fine-tuned"
                " one of step %d %.4g", costs[1], best["step"], costs[0],
            )  # fmt: skip
        return None
    texts = sorted(set(division.calibration.prompts))
    embeddings = dict(zip(texts, embedded(texts, "calibration"), strict=True))
    scaled = FrozenPredictor(
        source, embeddings, (weight / temperature).astype(np.float32), (bias / temperature).astype(np.float32),
        link="sigmoid",
    )  # fmt: skip
    return Finetuned(scaled, tuned, held)


def _train(
    tuner: Tuner, held_ids: Sequence[list[int]], look: Callable[[int, FloatArray], float], name: str, stages: Stages
) -> Mapping[str, NDArray[Any]]:
    """Train until the held-out loss has stopped falling; the weights of the look where it was least."""
    done = from_first(stages.load(name) if is_first() else None)
    best = from_first(stages.load(f"{name}-best") if is_first() else None)
    if done is not None and best is not None:
        return best
    losses: list[float] = []
    state = from_first(stages.load(f"{name}-state") if is_first() else None)
    if state is not None and best is not None:
        losses = state["loss"].tolist()
        tuner.restore(state)
    config = tuner.config
    total = config.epochs * tuner.steps_per_epoch
    watched = np.unique(np.rint(np.linspace(0, total, look_count(config))).astype(int))
    while len(losses) < len(watched) and len(losses) - 1 - _least(losses) < config.patience:
        if losses and math.isinf(losses[-1]):
            break
        step = int(watched[len(losses)])
        tuner.train(step)
        losses.append(look(step, tuner.predict(held_ids)))
        # the weights come before the state that speaks of them: a run that is stopped between the two repeats the look
        if _least(losses) == len(losses) - 1:
            best = stages.save(f"{name}-best", step=step, **tuner.weights())
        if step:
            stages.save(f"{name}-state", loss=losses, **tuner.state())
    assert best is not None
    stages.save(name, loss=losses)
    stages.drop(f"{name}-state")
    return best


def _least(losses: Sequence[float]) -> int:
    # the first of equals, and before any look none has failed
    return int(np.argmin(losses)) if losses else -1


def _embed_together(source: EncoderSource, texts: Sequence[str], device: str, tick: Callable[[], None]) -> Float32:
    """Embeddings of texts, (n, D), of which every process makes its share."""
    mine = own_share(torch.arange(len(texts)))
    h = embed(source, [texts[i] for i in mine.tolist()], tick, device)
    if not is_distributed():
        return h
    whole = torch.zeros(len(texts), h.shape[1], device=device)
    whole[mine.to(device)] = torch.from_numpy(h).to(device)
    torch.distributed.all_reduce(whole)
    return whole.cpu().numpy()


@contextmanager
def _deterministic(device: str) -> Iterator[None]:
    """On a GPU, operations that give the same bits every time; torch warns of one that has no such form."""
    if device == "cpu":
        yield
        return
    # cuBLAS reads it when it is first called with the setting below
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        # the backward passes of the fused forms add in no fixed order
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def _sigmoid(logits: FloatArray) -> FloatArray:
    p: FloatArray = 0.5 * (1.0 + np.tanh(0.5 * logits))
    return p


def _logit(p: FloatArray) -> FloatArray:
    clipped = np.clip(p, 1e-3, 1.0 - 1e-3)
    logits: FloatArray = np.log(clipped / (1.0 - clipped))
    return logits
