"""Train a router: features, closed form, refinement, path, certificate, checkpoint.

Beside the checkpoint ``OUT`` a folder ``OUT.training`` keeps what was tried: ``log.jsonl``, ``curves.json``, a plot,
and finished stages. A second run with the same configuration and data takes those up where the first stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from proteus_fast import checkpoint
from proteus_fast.certificate import Mode, check_delta
from proteus_fast.encoder import EncoderSource, describe
from proteus_fast.evaluation.metrics import (
    SELECTION_TARGETS,
    bootstrap_log_ratio,
    plug_in_curve,
    relative_targets,
    selection_cost,
)
from proteus_fast.evaluation.outcomes import FOLDS, Division, fold_of, read_division
from proteus_fast.training import predictor
from proteus_fast.training.calibrate import PolicyPart, cost_unit_and_scale, plug_in_checkpoint
from proteus_fast.training.crossfit import (
    columns_of,
    cross_fit,
    fit_cost_alpha,
    log_cost_scale,
    solve_columns,
    to_scores,
)
from proteus_fast.training.curves import write_policy_curves, write_search_curves
from proteus_fast.training.fit_policy import WATCH_EVERY, PolicyFit, Problem, fit_policy, watched_steps
from proteus_fast.training.frozen import FrozenPredictor, embed, fit_frozen
from proteus_fast.training.ppo import PolicyConfig, Trainer, is_first

if TYPE_CHECKING:
    from proteus_fast.training.refine import Refinement

FloatArray = NDArray[np.float64]

_STATE_VERSION = 4
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """What ``train`` does.

    Attributes:
        data: folder with train.parquet and val.parquet. out: checkpoint folder to write.
        encoder: ``hash``, or a transformer, which stays as it is: a Hugging Face directory, or a name on the hub. With
            one the mode is ``dual``. max_tokens: of the transformer; None: 512, or fewer where it has fewer.
        delta: error probability of the certificate, in (0, .5).
        seed: of everything random; the same seed, data and machine give the same model.
        table_rows: rows of the hash encoder's table, a power of two.
        extra_dim: columns beside the K regression directions.
        block_weights: weights of the feature blocks that are tried. alphas: ridge penalties that are tried.
        variants: ways of choosing among them, see ``predictor.fit_shrinkages``.
        refine: try the gradient refinement; it is kept only where it costs less out of fold in 95 % of resamples. Not
            tried where a policy is trained: the policy would see embeddings of a network that knows the labels.
        mode: ``dual`` certifies the plug-in rule alone; ``policy`` also trains the Beta policy and makes it the default
            mode; ``cheaper`` trains it too, the default is the mode that costs less out of fold.
        policy: how the policy is trained. device: where it is trained, ``cpu`` or ``cuda``.
        progress: show progress bars; None: where standard error is a terminal.
    """

    data: str | os.PathLike[str]
    out: str | os.PathLike[str]
    encoder: str = "hash"
    max_tokens: int | None = None
    delta: float = 0.1
    seed: int = 0
    table_rows: int = 1 << 16
    extra_dim: int = 64
    block_weights: tuple[tuple[float, ...], ...] = predictor.BLOCK_WEIGHTS
    alphas: tuple[float, ...] = predictor.ALPHAS
    variants: tuple[str, ...] = predictor.VARIANTS
    refine: bool = True
    mode: Literal["dual", "policy", "cheaper"] = "dual"
    policy: PolicyConfig | None = None
    device: str = "cpu"
    progress: bool | None = None


class Stages:
    """Finished stages of a run on disk, keyed by everything that they depend on."""

    def __init__(self, folder: Path, fingerprint: str, *, read_only: bool = False) -> None:
        self.folder = folder
        self._prefix = f"stage-{fingerprint[:16]}-"
        self._read_only = read_only
        self._began = time.monotonic()
        if read_only:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("stage-*.npz"):
            if not stale.name.startswith(self._prefix):
                stale.unlink()

    def load(self, name: str) -> dict[str, NDArray[Any]] | None:
        """Arrays of a finished stage; None where it has yet to run."""
        path = self.folder / f"{self._prefix}{name}.npz"
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)

    def save(self, name: str, **arrays: Any) -> dict[str, NDArray[Any]]:
        """Keep the arrays of a stage; a reader never sees a part of them."""
        if self._read_only:
            return {key: np.asarray(value) for key, value in arrays.items()}
        path = self.folder / f"{self._prefix}{name}.npz"
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        partial.rename(path)
        return {key: np.asarray(value) for key, value in arrays.items()}

    def log(self, **entry: Any) -> None:
        """Append a line to log.jsonl; ``seconds`` is since the run began."""
        if self._read_only:
            return
        entry["seconds"] = round(time.monotonic() - self._began, 3)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")


def fingerprint(config: TrainConfig, division: Division, source: EncoderSource | None = None) -> str:
    """Hash of everything that the stages depend on."""
    later = ("data", "out", "progress", "delta", "refine", "mode", "policy", "device")
    settings = {k: v for k, v in asdict(config).items() if k not in later}
    # labels of the calibration rows are not part of it: nothing before the certificate may depend on them
    if source is not None:
        settings |= {"encoder": source.sha256, "max_tokens": source.max_tokens}
    text = json.dumps([_STATE_VERSION, settings, division.fit.sha256], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _search(
    config: TrainConfig, division: Division, features: predictor.Features, stages: Stages, tick: Callable[[str], None]
) -> tuple[tuple[float, ...], predictor.Shrinkage, list[dict[str, Any]]]:
    fit = division.fit
    fold, price = fold_of(fit.prompts), fit.cost_usd.mean(axis=0)
    found: list[dict[str, NDArray[Any]]] = []
    for i in range(len(config.block_weights)):
        arrays = stages.load(f"search-{i}")
        if arrays is None:
            break
        found.append(arrays)
        tick("search")
    trials = predictor.search(
        features,
        fit.score,
        fold,
        lambda p: selection_cost(p, price, fit),
        config.block_weights[len(found) :],
        config.alphas,
        config.variants,
    )
    for tried, shrinkage in trials if len(found) < len(config.block_weights) else ():
        for trial in tried:
            stages.log(stage="search", **asdict(trial))
        costs = [trial.cost_usd for trial in tried]
        found.append(stages.save(f"search-{len(found)}", costs=costs, **asdict(shrinkage)))
        tick("search")
    best = int(np.argmin([float(arrays["costs"].min()) for arrays in found]))
    chosen = found[best]
    shrinkage = predictor.Shrinkage(chosen["rotation"], chosen["alpha"], chosen["p"], float(chosen["error"]))
    summary = [
        {"block_weight": weights, "cost_usd": float(arrays["costs"].min()), "error": float(arrays["error"])}
        for weights, arrays in zip(config.block_weights, found, strict=True)
    ]
    return config.block_weights[best], shrinkage, summary


def _refinement(
    config: TrainConfig, division: Division, encoder: predictor.HashPredictor | FrozenPredictor, p: FloatArray,
    stages: Stages, tick: Callable[[str], None],
) -> tuple[Refinement, bool]:  # fmt: skip
    """The refinement, and whether it is kept: it has to cost less in enough of the resamples of the fit rows.

    That is 95 % for the hash encoder, whose own columns know the labels, and half for a transformer, which knows none.
    """
    from proteus_fast.training.refine import refine

    fit = division.fit
    candidates = len(fit.candidates)
    h = encoder.encode(fit.prompts)
    enough = 0.5
    if isinstance(encoder, predictor.HashPredictor):
        size = np.diag(encoder.weight[:candidates])
        h[:, :candidates] = (p - fit.score.mean(axis=0)) / size
        enough = 0.95
    result = refine(h, fit.score, fold_of(fit.prompts), seed=config.seed, progress=lambda: tick("refine"))
    price = fit.cost_usd.mean(axis=0)
    taus = relative_targets(fit.score.mean(axis=0), price, SELECTION_TARGETS)
    curves = [plug_in_curve(np.clip(values, 0.0, 1.0), price, fit) for values in (result.p, p)]
    ratios = bootstrap_log_ratio(curves[0], curves[1], fit, taus, draws=200, seed=config.seed)
    share = float((ratios < 0).mean())
    stages.log(stage="refine", epochs=result.epochs, loss=result.loss.tolist(), cost_ratio=float(np.exp(ratios.mean())),
               share_of_resamples_cheaper=share)  # fmt: skip
    return result, share >= enough


@dataclass(frozen=True)
class Predictor:
    """Stage 1, finished.

    Attributes:
        encoder: with its linear predictor. p: out-of-fold predictions of the fit rows, (n, K), not clipped.
        tried: what the search tried. problem: rows for stage 2, where a policy is trained.
    """

    encoder: predictor.HashPredictor | FrozenPredictor
    p: FloatArray
    tried: list[dict[str, Any]]
    problem: Problem | None


def fit_predictor(config: TrainConfig, division: Division, stages: Stages, tick: Callable[[str], None]) -> Predictor:
    """Search, solve and lay the table; calls ``tick`` once for each block weight and once more.

    With a policy to follow, the encoder's table gets one more regression column, how dear a query is for all candidates
    together, and rows are predicted out of fold once more for each held-out fold.
    """
    fit = division.fit
    features = predictor.hash_features(fit.prompts, config.table_rows)
    block_weight, shrinkage, tried = _search(config, division, features, stages, tick)
    x = features.combined(block_weight)
    kernel = predictor.gram(x, x)
    candidates, mean = len(fit.candidates), fit.score.mean(axis=0)
    dual = predictor.fit_dual(kernel, fit.score, shrinkage)
    if config.mode == "dual":
        hashed = predictor.build_table(features, block_weight, dual, mean, candidates + config.extra_dim, config.seed)
        tick("table")
        return Predictor(hashed, shrinkage.p, tried, None)
    fold, scale = fold_of(fit.prompts), log_cost_scale(fit)
    squared_norm = float(np.square(block_weight).sum())
    arrays = stages.load("crossfit")
    if arrays is None:
        cost_alpha, explained = fit_cost_alpha(kernel, scale, fold, squared_norm)
        target, alpha = columns_of(fit.score, scale, shrinkage, cost_alpha)
        crossed = cross_fit(kernel, target, alpha, fold)
        stages.log(stage="crossfit", cost_alpha=cost_alpha, cost_variance_explained=explained)
        arrays = stages.save("crossfit", cost_alpha=cost_alpha, plain=crossed.plain, nested=crossed.nested)
    cost_dual = solve_columns(kernel, scale - scale.mean(), np.array([float(arrays["cost_alpha"])]))
    hashed = predictor.build_table(
        features, block_weight, np.concatenate([dual, cost_dual], axis=1), np.append(mean, scale.mean()),
        candidates + 1 + config.extra_dim, config.seed,
    )  # fmt: skip
    size = np.diag(hashed.weight[: candidates + 1]).astype(np.float64)
    svd = hashed.encode(fit.prompts)[:, candidates + 1 :]

    def embed(columns: FloatArray) -> NDArray[np.float32]:
        regression = to_scores(columns, shrinkage) / size
        others = np.broadcast_to(svd, (*columns.shape[:-1], svd.shape[1]))
        return np.concatenate([regression, others], axis=-1).astype(np.float32)

    plain, nested = (to_scores(arrays[name], shrinkage)[..., :-1] + mean for name in ("plain", "nested"))
    price = fit.cost_usd.mean(axis=0)
    unit, kappa = cost_unit_and_scale(plain, price)
    problem = Problem(fit, fold, price, unit, kappa, embed(arrays["plain"]), plain, embed(arrays["nested"]), nested)
    # the cost column is for the policy's eyes only
    hashed = replace(hashed, weight=np.ascontiguousarray(hashed.weight[:, :candidates]), bias=hashed.bias[:candidates])
    tick("table")
    return Predictor(hashed, plain, tried, problem)


def fit_frozen_predictor(
    config: TrainConfig, division: Division, source: EncoderSource, stages: Stages, tick: Callable[[str], None]
) -> Predictor:
    """Embed every text, and regress; calls ``tick`` 101 times."""
    fit = division.fit
    texts = sorted({*fit.prompts, *division.calibration.prompts})
    arrays = stages.load("embeddings")
    if arrays is None or len(arrays["h"]) != len(texts):
        arrays = stages.save("embeddings", h=embed(source, texts, lambda: tick("embed"), config.device))
    embeddings: dict[str, NDArray[np.float32]] = dict(zip(texts, arrays["h"], strict=True))
    h = np.stack([embeddings[text] for text in fit.prompts])
    price = fit.cost_usd.mean(axis=0)
    weight, bias, shrinkage, trials = fit_frozen(
        h, fit.score, fold_of(fit.prompts), lambda p: selection_cost(p, price, fit), config.alphas, config.variants
    )
    for trial in trials:
        stages.log(stage="search", **asdict(trial))
    tick("search")
    cheapest = min(trials, key=lambda trial: trial.cost_usd)
    tried = [{"block_weight": (), "cost_usd": cheapest.cost_usd, "error": shrinkage.error}]
    return Predictor(FrozenPredictor(source, embeddings, weight, bias), shrinkage.p, tried, None)


def train(config: TrainConfig) -> Path:
    """Train on ``train.parquet`` and ``val.parquet`` of a folder and write a checkpoint.

    Nothing before the certificate reads the labels of val or of the calibration quarter of train. Under
    torch.distributed every process runs this; the policy's gradients are shared, and the first process writes.

    Returns:
        The checkpoint's folder.

    Raises:
        FileNotFoundError, ValueError: the data or the configuration is not as it should be.
    """
    check_delta(config.delta)
    if config.encoder != "hash" and config.mode != "dual":
        raise ValueError(f"mode: expected dual with a transformer, got {config.mode!r}")
    if config.mode not in ("dual", "policy", "cheaper"):
        raise ValueError(f"mode: expected one of dual, policy, cheaper, got {config.mode!r}")
    if config.device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {config.device!r}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected 'cpu' where torch sees no CUDA device, got 'cuda'")
    if config.seed < 0:
        raise ValueError(f"seed: expected an integer of at least 0, got {config.seed}")
    if config.table_rows < 2 or config.table_rows & (config.table_rows - 1):
        raise ValueError(f"table_rows: expected a power of two, got {config.table_rows}")
    out = Path(config.out)
    checkpoint.check_target(out)
    source = None if config.encoder == "hash" else describe(config.encoder, config.max_tokens)[0]
    division = read_division(config.data)
    fit = division.fit
    if len(np.unique(fold_of(fit.prompts))) < FOLDS:
        raise ValueError(f"data: expected enough training rows for {FOLDS} folds, got {len(fit)} to fit")
    with_policy = config.mode != "dual"
    settings = config.policy or PolicyConfig()
    refines = config.refine and not with_policy
    stages = Stages(
        out.with_name(out.name + ".training"), fingerprint(config, division, source), read_only=not is_first()
    )
    looks = FOLDS * len(watched_steps(settings)) + settings.steps // WATCH_EVERY if with_policy else 0
    total = 1 + (1 + len(config.block_weights) if source is None else 101) + (6 if refines else 0) + looks
    disable = None if config.progress is None else not config.progress
    with tqdm(total=total, desc=f"train {fit.name}", disable=disable or not is_first() or None, unit="step") as bar:

        def tick(stage: str) -> None:
            bar.set_postfix_str(stage)
            bar.update()

        def look(trainer: Trainer) -> None:
            tick(trainer.summary())

        if source is None:
            first = fit_predictor(config, division, stages, tick)
        else:
            first = fit_frozen_predictor(config, division, source, stages, tick)
        encoder, p = first.encoder, np.clip(first.p, 0.0, 1.0)
        link = "clip"
        head: dict[str, checkpoint.Array] = {"predictor.weight": encoder.weight, "predictor.bias": encoder.bias}
        refined = _refinement(config, division, encoder, first.p, stages, tick) if refines else None
        if refined is not None and refined[1]:
            head, p, link = dict(refined[0].tensors), refined[0].p, "sigmoid"
        policy, fitted = None, None
        if first.problem is not None:
            fitted = fit_policy(
                first.problem, settings, seed=config.seed, store=stages, progress=look, device=config.device
            )
            stages.log(stage="policy trained")
            policy = _policy_part(config, fitted)
            _log_policy(stages, fitted, policy.mode)
        result = plug_in_checkpoint(
            fit,
            p,
            division.calibration,
            encoder.encode(division.calibration.prompts),
            encoder.tensors() | head,
            encoder=encoder.block_weight,
            source=source,
            link=link,
            delta=config.delta,
            seed=config.seed,
            policy=policy,
        )
        if is_first():
            checkpoint.save(result, out)
            if first.problem is not None and fitted is not None:
                write_policy_curves(stages.folder, first.problem, fitted)
            write_search_curves(
                stages.folder, fit.name, first.tried, [] if refined is None else refined[0].loss.tolist()
            )
        tick("certificate")
    return out


def _policy_part(config: TrainConfig, fitted: PolicyFit) -> PolicyPart:
    network = fitted.trainer.served
    cheaper = fitted.chosen_cost_usd < fitted.dual_cost_usd
    mode: Mode = "policy" if config.mode == "policy" or cheaper else "dual"
    return PolicyPart(network.tensors(), network.head, float(network.gamma.detach()), fitted.path, mode)


def _log_policy(stages: Stages, fitted: PolicyFit, mode: Mode) -> None:
    for entry in fitted.trainer.log:
        stages.log(stage="policy", **entry)
    stages.log(
        stage="policy selected", steps=fitted.steps, tried=fitted.tried.tolist(), cost_usd=fitted.cost_usd.tolist(),
        dual_cost_usd=fitted.dual_cost_usd, mode=mode, unsatisfiable=fitted.unsatisfiable,
    )  # fmt: skip
    if fitted.unsatisfiable:
        _logger.warning("targets that the training rows cannot meet: %s", fitted.unsatisfiable)
