"""Train a router: features, closed form, refinement, path, certificate, checkpoint.

Beside the checkpoint ``OUT`` a folder ``OUT.training`` keeps what was tried: ``log.jsonl``, ``curves.json``, a plot,
and finished stages. A second run with the same configuration and data takes those up where the first stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from proteus_fast import checkpoint
from proteus_fast.certificate import Mode, check_delta, check_seed
from proteus_fast.encoder import EncoderSource, describe
from proteus_fast.evaluation.links import LINKS, Link
from proteus_fast.evaluation.metrics import (
    SELECTION_TARGETS,
    bootstrap_log_ratio,
    plug_in_curve,
    relative_targets,
)
from proteus_fast.evaluation.outcomes import FOLDS, Division, calibration_notes, fold_of, read_division
from proteus_fast.training import predictor
from proteus_fast.training.calibrate import PolicyPart, plug_in_checkpoint, pool_of
from proteus_fast.training.curves import write_policy_curves, write_search_curves
from proteus_fast.training.distil import MOST_ROWS, read_prompts
from proteus_fast.training.distributed import is_first
from proteus_fast.training.finetune import FinetuneConfig, finetune, look_count
from proteus_fast.training.fit_policy import WATCH_EVERY, PolicyFit, fit_policy, watched_steps
from proteus_fast.training.fit_predictor import (
    TEACHER_TICKS,
    Predictor,
    TeacherTexts,
    fit_frozen_predictor,
    fit_predictor,
)
from proteus_fast.training.frozen import FrozenPredictor
from proteus_fast.training.ppo import PolicyConfig, Trainer
from proteus_fast.training.stages import Stages

if TYPE_CHECKING:
    from proteus_fast.training.refine import Refinement

FloatArray = NDArray[np.float64]

_STATE_VERSION = 5
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """What ``train`` does.

    Attributes:
        data: folder with train.parquet and val.parquet. out: checkpoint folder to write.
        encoder: ``hash``, or a transformer: a Hugging Face directory, or a name on the hub. With one the mode is
            ``dual``. max_tokens: of the transformer; None: 512, or fewer where it has fewer.
        teacher: a transformer that the hash encoder learns from, where that costs less out of fold. unlabelled: a
            Parquet file with a column ``prompt``, further texts that the teacher is asked about; those of the tables
            are left out.
        hold_encoder: copy the transformer into the checkpoint. finetune: also train all of the transformer's weights,
            and keep that, always held, where it costs less on a held-out fold.
        delta: error probability of the certificate, in (0, .5).
        seed: of everything random; the same seed, data and machine give the same model.
        table_rows: rows of the hash encoder's table, a power of two.
        extra_dim: columns beside the K regression directions.
        block_weights: weights of the feature blocks that are tried. alphas: ridge penalties that are tried.
        variants: ways of choosing among them, see ``predictor.fit_shrinkages``. links: those that are tried, see
            ``links.through_link``.
        refine: try the gradient refinement; it is kept only where it costs less out of fold in 95 % of resamples. Not
            tried where a policy is trained: the policy would see embeddings of a network that knows the labels.
        mode: ``dual`` certifies the plug-in rule alone; ``policy`` also trains the Beta policy and makes it the default
            mode; ``cheaper`` trains it too, the default is the mode that costs less out of fold.
        policy: how the policy is trained. device: where it and a transformer are trained, ``cpu`` or ``cuda``.
        progress: show progress bars; None: where standard error is a terminal.
    """

    data: str | os.PathLike[str]
    out: str | os.PathLike[str]
    encoder: str = "hash"
    max_tokens: int | None = None
    teacher: str | None = None
    unlabelled: str | os.PathLike[str] | None = None
    hold_encoder: bool = False
    finetune: FinetuneConfig | None = None
    delta: float = 0.1
    seed: int = 0
    table_rows: int = 1 << 16
    extra_dim: int = 64
    block_weights: tuple[tuple[float, ...], ...] = predictor.BLOCK_WEIGHTS
    alphas: tuple[float, ...] = predictor.ALPHAS
    variants: tuple[str, ...] = predictor.VARIANTS
    links: tuple[Link, ...] = LINKS
    refine: bool = True
    mode: Literal["dual", "policy", "cheaper"] = "dual"
    policy: PolicyConfig | None = None
    device: str = "cpu"
    progress: bool | None = None


def fingerprint(
    config: TrainConfig, division: Division, source: EncoderSource | None = None, unlabelled: Sequence[str] = ()
) -> str:
    """Hash of everything that the stages depend on; ``source`` is of the encoder or the teacher."""
    later = ("data", "out", "progress", "delta", "refine", "mode", "policy", "device", "hold_encoder", "finetune",
             "teacher", "unlabelled")  # fmt: skip
    settings = {k: v for k, v in asdict(config).items() if k not in later}
    # labels of the calibration rows are not part of it: nothing before the certificate may depend on them
    if source is not None:
        settings |= {"transformer": source.sha256, "max_tokens": source.max_tokens}
        settings |= {"taught": config.teacher is not None, "unlabelled": list(unlabelled)}
    text = json.dumps([_STATE_VERSION, settings, division.fit.sha256], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _refinement(
    config: TrainConfig, division: Division, first: Predictor, stages: Stages, tick: Callable[[str], None]
) -> tuple[Refinement, bool]:
    """The refinement, and whether it is kept: it has to cost less in enough of the resamples of the fit rows.

    That is 95 % for the hash encoder, whose own columns know the labels, and half for a transformer, which knows none.
    """
    from proteus_fast.training.refine import refine

    fit = division.fit
    enough = 0.95 if isinstance(first.encoder, predictor.HashPredictor) else 0.5
    result = refine(first.h, fit.score, fold_of(fit.prompts), seed=config.seed, progress=lambda: tick("refine"))
    price = fit.cost_usd.mean(axis=0)
    taus = relative_targets(fit.score.mean(axis=0), price, SELECTION_TARGETS)
    curves = [plug_in_curve(np.clip(values, 0.0, 1.0), price, fit) for values in (result.p, first.p)]
    ratios = bootstrap_log_ratio(curves[0], curves[1], fit, taus, draws=200, seed=config.seed)
    share = float((ratios < 0).mean())
    stages.log(stage="refine", epochs=result.epochs, loss=result.loss.tolist(), cost_ratio=float(np.exp(ratios.mean())),
               share_of_resamples_cheaper=share)  # fmt: skip
    return result, share >= enough


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
    if config.encoder == "hash" and (config.finetune is not None or config.hold_encoder):
        raise ValueError("encoder: expected a transformer to fine-tune or to hold, got 'hash'")
    if config.encoder != "hash" and config.teacher is not None:
        raise ValueError(f"encoder: expected hash with a teacher, got {config.encoder!r}")
    if config.encoder == "hash" and config.teacher is None and config.max_tokens is not None:
        raise ValueError("max_tokens: expected none without a transformer, got " + str(config.max_tokens))
    if config.teacher is None and config.unlabelled is not None:
        raise ValueError("unlabelled: expected a teacher to ask about the prompts, got none")
    if config.mode not in ("dual", "policy", "cheaper"):
        raise ValueError(f"mode: expected one of dual, policy, cheaper, got {config.mode!r}")
    if config.device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {config.device!r}")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected 'cpu' where torch sees no CUDA device, got 'cuda'")
    check_seed(config.seed)
    if config.table_rows < 2 or config.table_rows & (config.table_rows - 1):
        raise ValueError(f"table_rows: expected a power of two, got {config.table_rows}")
    out = Path(config.out)
    name = config.teacher if config.encoder == "hash" else config.encoder
    try:
        transformer = None if name is None else describe(name, config.max_tokens)[0]
    except (OSError, ValueError) as error:
        # which of the two arguments
        text = str(error)
        raise type(error)(text.replace("encoder:", "teacher:", 1) if config.encoder == "hash" else text) from None
    source = None if config.encoder == "hash" else transformer
    checkpoint.check_target(out, source if source is None else replace(source, held=config.hold_encoder))
    division = read_division(config.data)
    fit = division.fit
    # what no checkpoint could hold is refused before the work
    pool_of(fit)
    known = (*fit.prompts, *division.calibration.prompts)
    for note in calibration_notes(division.calibration.prompts) if is_first() else ():
        _logger.warning("calibration rows: %s", note)
    unlabelled = () if config.unlabelled is None else read_prompts(config.unlabelled, known)
    if len(fit) + len(unlabelled) > MOST_ROWS and unlabelled:
        most = max(MOST_ROWS - len(fit), 0)
        raise ValueError(f"unlabelled: expected at most {most} prompts beside {len(fit)} rows, got {len(unlabelled)}")
    taught = None if source is not None or transformer is None else TeacherTexts(transformer, unlabelled)
    if len(np.unique(fold_of(fit.prompts))) < FOLDS:
        raise ValueError(f"data: expected enough training rows for {FOLDS} folds, got {len(fit)} to fit")
    with_policy = config.mode != "dual"
    settings = config.policy or PolicyConfig()
    refines = config.refine and not with_policy
    stages = Stages(
        out.with_name(out.name + ".training"),
        fingerprint(config, division, transformer, unlabelled),
        read_only=not is_first(),
    )
    looks = FOLDS * len(watched_steps(settings)) + settings.steps // WATCH_EVERY if with_policy else 0
    looks += 0 if taught is None else TEACHER_TICKS
    looks += 0 if config.finetune is None else look_count(config.finetune) + 200
    total = 1 + (1 + len(config.block_weights) if source is None else 101) + (6 if refines else 0) + looks
    disable = None if config.progress is None else not config.progress
    with tqdm(total=total, desc=f"train {fit.name}", disable=disable or not is_first() or None, unit="step") as bar:

        def tick(stage: str) -> None:
            bar.set_postfix_str(stage)
            bar.update()

        def look(trainer: Trainer) -> None:
            tick(trainer.summary())

        if source is None:
            first = fit_predictor(config, division, stages, tick, taught)
        else:
            first = fit_frozen_predictor(config, division, source, stages, tick)
        encoder, p = first.encoder, np.clip(first.p, 0.0, 1.0)
        link = encoder.link
        head: dict[str, checkpoint.Array] = {"predictor.weight": encoder.weight, "predictor.bias": encoder.bias}
        refined = _refinement(config, division, first, stages, tick) if refines else None
        if refined is not None and refined[1]:
            head, p, link = dict(refined[0].tensors), refined[0].p, "sigmoid"
        tuned = None
        if config.finetune is not None and isinstance(encoder, FrozenPredictor):
            tuned = finetune(
                encoder, p, division, config.finetune, stages, alphas=config.alphas, variants=config.variants,
                seed=config.seed, device=config.device, tick=tick,
            )  # fmt: skip
        if tuned is not None:
            encoder, p, link = tuned.predictor, tuned.p, "sigmoid"
            head = {"predictor.weight": encoder.weight, "predictor.bias": encoder.bias}
        if isinstance(encoder, FrozenPredictor):
            source = replace(encoder.source, held=encoder.source.held or config.hold_encoder)
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
            predicted=None if tuned is None else tuned.predicted,
            link=link,
            delta=config.delta,
            seed=config.seed,
            policy=policy,
        )
        if is_first():
            checkpoint.save(result, out)
            if tuned is not None:
                shutil.rmtree(tuned.predictor.source.directory)
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
