"""Train a router: features, closed form, refinement, path, certificate, checkpoint.

Beside the checkpoint ``OUT`` a folder ``OUT.training`` keeps what was tried: ``log.jsonl``, ``curves.json``, a plot,
and finished stages. A second run with the same configuration and data takes those up where the first stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from proteus_fast import checkpoint
from proteus_fast.certificate import check_delta
from proteus_fast.evaluation.metrics import (
    SELECTION_TARGETS,
    bootstrap_log_ratio,
    plug_in_curve,
    relative_targets,
    selection_cost,
)
from proteus_fast.evaluation.outcomes import FOLDS, Division, fold_of, read_division
from proteus_fast.training import predictor
from proteus_fast.training.calibrate import plug_in_checkpoint

if TYPE_CHECKING:
    from proteus_fast.training.refine import Refinement

FloatArray = NDArray[np.float64]

_STATE_VERSION = 3


@dataclass(frozen=True)
class TrainConfig:
    """What ``train`` does.

    Attributes:
        data: folder with train.parquet and val.parquet. out: checkpoint folder to write.
        encoder: ``hash``, the only one that is trained so far. delta: error probability of the certificate, in (0, .5).
        seed: of everything random; the same seed, data and machine give the same model.
        table_rows: rows of the encoder's table, a power of two. extra_dim: columns beside the K regression directions.
        block_weights: weights of the feature blocks that are tried. alphas: ridge penalties that are tried.
        variants: ways of choosing among them, see ``predictor.fit_shrinkages``.
        refine: try the gradient refinement; it is kept only where it costs less out of fold in 95 % of resamples.
        progress: show progress bars; None: where standard error is a terminal.
    """

    data: str | os.PathLike[str]
    out: str | os.PathLike[str]
    encoder: Literal["hash"] = "hash"
    delta: float = 0.1
    seed: int = 0
    table_rows: int = 1 << 16
    extra_dim: int = 64
    block_weights: tuple[tuple[float, ...], ...] = predictor.BLOCK_WEIGHTS
    alphas: tuple[float, ...] = predictor.ALPHAS
    variants: tuple[str, ...] = predictor.VARIANTS
    refine: bool = True
    progress: bool | None = None


class _Stages:
    """Finished stages of a run on disk, keyed by everything that they depend on."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._prefix = f"stage-{fingerprint[:16]}-"
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
        path = self.folder / f"{self._prefix}{name}.npz"
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        partial.rename(path)
        return {key: np.asarray(value) for key, value in arrays.items()}

    def log(self, **entry: Any) -> None:
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")


def _fingerprint(config: TrainConfig, division: Division) -> str:
    settings = {k: v for k, v in asdict(config).items() if k not in ("data", "out", "progress", "delta", "refine")}
    # labels of the calibration rows are not part of it: nothing before the certificate may depend on them
    text = json.dumps([_STATE_VERSION, settings, division.fit.sha256], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _search(
    config: TrainConfig, division: Division, features: predictor.Features, stages: _Stages, tick: Callable[[str], None]
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
    config: TrainConfig, division: Division, hashed: predictor.HashPredictor, p: FloatArray, stages: _Stages,
    tick: Callable[[str], None],
) -> tuple[Refinement, bool]:  # fmt: skip
    """The refinement, and whether it is kept: it has to cost less in 95 % of the resamples of the fit rows."""
    from proteus_fast.training.refine import refine

    fit = division.fit
    candidates = len(fit.candidates)
    h = hashed.encoder().encode(fit.prompts)
    size = np.diag(hashed.weight[:candidates])
    h[:, :candidates] = (p - fit.score.mean(axis=0)) / size
    result = refine(h, fit.score, fold_of(fit.prompts), seed=config.seed, progress=lambda: tick("refine"))
    price = fit.cost_usd.mean(axis=0)
    taus = relative_targets(fit.score.mean(axis=0), price, SELECTION_TARGETS)
    curves = [plug_in_curve(np.clip(values, 0.0, 1.0), price, fit) for values in (result.p, p)]
    ratios = bootstrap_log_ratio(curves[0], curves[1], fit, taus, draws=200, seed=config.seed)
    share = float((ratios < 0).mean())
    stages.log(stage="refine", epochs=result.epochs, loss=result.loss.tolist(), cost_ratio=float(np.exp(ratios.mean())),
               share_of_resamples_cheaper=share)  # fmt: skip
    return result, share >= 0.95


def train(config: TrainConfig) -> Path:
    """Train on ``train.parquet`` and ``val.parquet`` of a folder and write a checkpoint.

    Nothing before the certificate reads the labels of val or of the calibration quarter of train.

    Returns:
        The checkpoint's folder.

    Raises:
        FileNotFoundError, ValueError: the data or the configuration is not as it should be.
    """
    check_delta(config.delta)
    if config.encoder != "hash":
        raise ValueError(f"encoder: expected 'hash', got {config.encoder!r}")
    if config.table_rows < 2 or config.table_rows & (config.table_rows - 1):
        raise ValueError(f"table_rows: expected a power of two, got {config.table_rows}")
    out = Path(config.out)
    checkpoint.check_target(out)
    division = read_division(config.data)
    fit = division.fit
    if len(np.unique(fold_of(fit.prompts))) < FOLDS:
        raise ValueError(f"data: expected enough training rows for {FOLDS} folds, got {len(fit)} to fit")
    stages = _Stages(out.with_name(out.name + ".training"), _fingerprint(config, division))
    steps = 2 + len(config.block_weights) + (6 if config.refine else 0)
    disable = None if config.progress is None else not config.progress
    with tqdm(total=steps, desc=f"train {fit.name}", disable=disable, unit="step") as bar:

        def tick(stage: str) -> None:
            bar.set_postfix_str(stage)
            bar.update()

        features = predictor.hash_features(fit.prompts, config.table_rows)
        block_weight, shrinkage, tried = _search(config, division, features, stages, tick)
        p = np.clip(shrinkage.p, 0.0, 1.0)
        x = features.combined(block_weight)
        dual = predictor.fit_dual(predictor.gram(x, x), fit.score, shrinkage)
        mean, dim = fit.score.mean(axis=0), len(fit.candidates) + config.extra_dim
        hashed = predictor.build_table(features, block_weight, dual, mean, dim, config.seed)
        tick("table")
        tensors: dict[str, checkpoint.Array] = {
            "encoder.table": hashed.table,
            "encoder.row_scale": hashed.row_scale,
            "encoder.idf": hashed.idf,
        }
        link = "clip"
        head: dict[str, checkpoint.Array] = {"predictor.weight": hashed.weight, "predictor.bias": hashed.bias}
        refined = _refinement(config, division, hashed, shrinkage.p, stages, tick) if config.refine else None
        if refined is not None and refined[1]:
            head, p, link = dict(refined[0].tensors), refined[0].p, "sigmoid"
        result = plug_in_checkpoint(
            fit,
            p,
            division.calibration,
            hashed.encoder().encode(division.calibration.prompts),
            tensors | head,
            encoder=hashed.block_weight,
            link=link,
            delta=config.delta,
            seed=config.seed,
        )
        checkpoint.save(result, out)
        tick("certificate")
    _write_curves(stages.folder, fit.name, tried, [] if refined is None else refined[0].loss.tolist())
    return out


def _write_curves(folder: Path, name: str, tried: list[dict[str, Any]], losses: list[float]) -> None:
    """Write what was tried: curves.json, and curves.png with the out-of-fold figures and the refinement's losses."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    (folder / "curves.json").write_text(json.dumps({"search": tried, "refine_loss": losses}, indent=1) + "\n")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    labels = [" ".join(f"{weight:g}" for weight in trial["block_weight"]) for trial in tried]
    left.bar(labels, [1000 * trial["cost_usd"] for trial in tried], color="tab:blue")
    left.set(title=f"{name}: closed form, out of fold", xlabel="block weights", ylabel="USD per 1,000 queries")
    left.tick_params(axis="x", labelsize=7)
    right.plot(range(1, len(losses) + 1), losses, marker="o", color="tab:orange")
    right.set(title="refinement, held-out folds", xlabel="epoch", ylabel="cross-entropy")
    figure.savefig(folder / "curves.png", dpi=120)
    pyplot.close(figure)
