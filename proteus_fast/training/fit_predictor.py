"""Stage 1 of training: the predictor on the hash encoder or on a transformer, and its honest predictions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from proteus_fast.encoder import EncoderSource
from proteus_fast.evaluation.links import Link, linked_head, through_link
from proteus_fast.evaluation.metrics import (
    SELECTION_TARGETS,
    bootstrap_log_ratio,
    plug_in_curve,
    relative_targets,
    selection_cost,
)
from proteus_fast.evaluation.outcomes import FOLDS, Division, OutcomeTable, fold_of
from proteus_fast.training import predictor
from proteus_fast.training.calibrate import cost_unit_and_scale
from proteus_fast.training.crossfit import (
    CrossFit,
    columns_of,
    cross_fit,
    fit_cost_alpha,
    log_cost_scale,
    solve_columns,
    to_scores,
)
from proteus_fast.training.distil import UNLABELLED, Teacher, cross_fit_student, fit_student
from proteus_fast.training.distributed import is_first
from proteus_fast.training.fit_policy import Problem
from proteus_fast.training.frozen import FrozenPredictor, embed, embeddings_key, fit_frozen
from proteus_fast.training.stages import Stages

if TYPE_CHECKING:
    from proteus_fast.training.train import TrainConfig

FloatArray = NDArray[np.float64]

TEACHER_TICKS = 100 + 1 + FOLDS
"""How often ``fit_predictor`` calls ``tick`` for a teacher, at most."""

_logger = logging.getLogger(__name__)


def _search(
    config: TrainConfig, division: Division, features: predictor.Features, stages: Stages, tick: Callable[[str], None]
) -> tuple[tuple[float, ...], predictor.Shrinkage, Link, list[dict[str, Any]]]:
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
        config.links,
    )
    for tried, best_trial, shrinkage in trials if len(found) < len(config.block_weights) else ():
        for trial in tried:
            stages.log(stage="search", **asdict(trial))
        costs = [trial.cost_usd for trial in tried]
        found.append(stages.save(f"search-{len(found)}", costs=costs, link=best_trial.link, **asdict(shrinkage)))
        tick("search")
    best = int(np.argmin([float(arrays["costs"].min()) for arrays in found]))
    chosen = found[best]
    shrinkage = predictor.Shrinkage(chosen["rotation"], chosen["alpha"], chosen["p"], float(chosen["error"]))
    summary = [
        {"block_weight": weights, "cost_usd": float(arrays["costs"].min()), "error": float(arrays["error"])}
        for weights, arrays in zip(config.block_weights, found, strict=True)
    ]
    link: Link = "sigmoid" if str(chosen["link"]) == "sigmoid" else "clip"
    return config.block_weights[best], shrinkage, link, summary


@dataclass(frozen=True)
class Predictor:
    """Stage 1, finished.

    Attributes:
        encoder: with its predictor. p: out-of-fold predictions of the fit rows, (n, K). h: embeddings of those rows
            that know no label of their own, (n, D). tried: what the search tried. problem: rows for stage 2, where a
            policy is trained.
    """

    encoder: predictor.HashPredictor | FrozenPredictor
    p: FloatArray
    h: NDArray[np.float32]
    tried: list[dict[str, Any]]
    problem: Problem | None


@dataclass(frozen=True)
class TeacherTexts:
    """A frozen transformer to learn from, and the prompts without labels that it is asked about besides."""

    source: EncoderSource
    unlabelled: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Regression:
    """What a table's columns are laid from.

    Attributes:
        features: of m texts, the n fit rows first. linear: out-of-fold predictions of the fit rows, (n, K).
        link: which makes accuracies of them. shrinkage: of the regression on labels. dual: dual coefficients, (m, K).
        mean: of the targets, (K,).
        mixing: (K, K) of ``distil.Student``, with ``taught``, which makes predictions of the fit rows by the part that
            learns from a teacher; None without one.
    """

    features: predictor.Features
    linear: FloatArray
    link: Link
    shrinkage: predictor.Shrinkage
    dual: FloatArray
    mean: FloatArray
    mixing: FloatArray | None = None
    taught: Callable[[], CrossFit] | None = None


def _distil(
    config: TrainConfig, fit: OutcomeTable, features: predictor.Features, block_weight: tuple[float, ...],
    closed: _Regression, teacher_texts: TeacherTexts, stages: Stages, tick: Callable[[str], None],
) -> _Regression:  # fmt: skip
    """The regression with a teacher, where it costs less out of fold; else the one without."""
    n, price = len(fit), fit.cost_usd.mean(axis=0)
    texts = sorted({*fit.prompts, *teacher_texts.unlabelled})
    embeddings = embedded(teacher_texts.source, texts, stages, tick, config.device)
    h = np.stack([embeddings[text] for text in (*fit.prompts, *teacher_texts.unlabelled)])
    if teacher_texts.unlabelled:
        more = predictor.hash_features(teacher_texts.unlabelled, config.table_rows, features.idf)
        blocks = zip(features.blocks, more.blocks, strict=True)
        features = replace(features, blocks=tuple(scipy.sparse.vstack(pair, "csr") for pair in blocks))
    x = features.combined(block_weight)
    kernel, squared_norm = predictor.gram(x, x), float(np.square(block_weight).sum())
    fold = np.concatenate([fold_of(fit.prompts), np.full(len(teacher_texts.unlabelled), UNLABELLED)])

    def cost_of(p: FloatArray) -> float:
        return selection_cost(p, price, fit)

    teacher = Teacher(kernel[:, :n] / np.float32(squared_norm), h, fit.score, fold[:n])
    tick("teacher")
    alphas = [alpha * squared_norm for alpha in config.alphas]
    labelled = predictor.fit_shrinkages(kernel[:n, :n], fit.score, fold[:n], alphas, config.variants)
    student, trials = fit_student(
        kernel, teacher, fit.score, fold, labelled, cost_of, squared_norm=squared_norm, links=config.links,
        tick=lambda: tick("student"),
    )  # fmt: skip
    for trial in trials:
        stages.log(stage="distil", **trial._asdict())
    mean_score = fit.score.mean(axis=0)
    p_without = through_link(closed.linear, mean_score, closed.link)
    p = through_link(student.p, mean_score, student.trial.link)
    without = cost_of(p_without)
    kept = student.trial.cost_usd < without
    taus = relative_targets(mean_score, price, SELECTION_TARGETS)
    curves = [plug_in_curve(values, price, fit) for values in (p, p_without)]
    ratios = bootstrap_log_ratio(curves[0], curves[1], fit, taus, draws=200, seed=config.seed)
    stages.log(
        stage="distil selected", kept=kept, **student.trial._asdict(), cost_usd_without=without,
        share_of_resamples_cheaper=float((ratios < 0).mean()), unlabelled=len(teacher_texts.unlabelled),
        teacher_share=teacher.share, teacher_decay=teacher.decay, teacher_error=teacher.shrinkage.error,
        teacher_cost_usd=cost_of(np.clip(teacher.shrinkage.p, 0.0, 1.0)),
        error=float(((p - fit.score) ** 2).mean()), error_without=float(((p_without - fit.score) ** 2).mean()),
    )  # fmt: skip
    if not kept and is_first():
        _logger.warning("the teacher does not make the router cheaper out of fold: it is trained on labels alone")
    if not kept:
        return closed
    own = _padded(predictor.fit_dual(kernel[:n, :n], fit.score, student.shrinkage), len(kernel))
    dual = own + (student.dual - own) @ student.mixing
    mean = mean_score + (student.teacher_mean - mean_score) @ student.mixing

    def taught() -> CrossFit:
        crossed = cross_fit_student(kernel, teacher, student, fold)
        return CrossFit(crossed.plain[:n], crossed.nested[:, :n])

    return _Regression(features, student.p, student.trial.link, student.shrinkage, dual, mean, student.mixing, taught)


def _padded(dual: FloatArray, rows: int) -> FloatArray:
    """Dual coefficients with zeros for the rows without labels, (rows, C)."""
    return np.pad(dual, ((0, rows - len(dual)), (0, 0)))


def _centred_predictions(regression: _Regression, crossed: CrossFit, mean_score: FloatArray) -> CrossFit:
    """Scores and cost scale without their means, (n, K + 1), from columns of labels and cost, and from a teacher."""
    plain, nested = (to_scores(columns, regression.shrinkage) for columns in (crossed.plain, crossed.nested))
    if regression.mixing is None or regression.taught is None:
        return CrossFit(plain, nested)
    taught = regression.taught()
    for values, others in ((plain, taught.plain), (nested, taught.nested)):
        own = values[..., :-1] + mean_score
        values[..., :-1] = own + (others - own) @ regression.mixing - regression.mean
    return CrossFit(plain, nested)


def fit_predictor(
    config: TrainConfig,
    division: Division,
    stages: Stages,
    tick: Callable[[str], None],
    teacher_texts: TeacherTexts | None = None,
) -> Predictor:
    """Search, learn from a teacher, solve and lay the table.

    Calls ``tick`` once for each block weight and once more, with a teacher ``TEACHER_TICKS`` times more.

    With a policy to follow, the encoder's table gets one more regression column, how dear a query is for all candidates
    together, and rows are predicted out of fold once more for each held-out fold.
    """
    fit = division.fit
    features = predictor.hash_features(fit.prompts, config.table_rows)
    block_weight, shrinkage, link, tried = _search(config, division, features, stages, tick)
    x = features.combined(block_weight)
    kernel = predictor.gram(x, x)
    dual = predictor.fit_dual(kernel, fit.score, shrinkage)
    mean_score = fit.score.mean(axis=0)
    found = _Regression(features, shrinkage.p, link, shrinkage, dual, mean_score)
    if teacher_texts is not None:
        found = _distil(config, fit, features, block_weight, found, teacher_texts, stages, tick)
    candidates, mean = len(fit.candidates), found.mean

    def linked(hashed: predictor.HashPredictor) -> predictor.HashPredictor:
        # a column of cost is for the policy's eyes only
        weight, bias = hashed.weight[:, :candidates].astype(np.float64), hashed.bias[:candidates].astype(np.float64)
        head = linked_head(np.ascontiguousarray(weight), bias, mean_score, found.link)
        return replace(hashed, weight=head[0], bias=head[1], link=found.link)

    if config.mode == "dual":
        hashed = predictor.build_table(
            found.features, block_weight, found.dual, mean, candidates + config.extra_dim, config.seed
        )
        h = hashed.encode(fit.prompts)
        h[:, :candidates] = (found.linear - mean) / np.diag(hashed.weight[:candidates])
        tick("table")
        return Predictor(linked(hashed), through_link(found.linear, mean_score, found.link), h, tried, None)
    fold, scale = fold_of(fit.prompts), log_cost_scale(fit)
    squared_norm = float(np.square(block_weight).sum())
    arrays = stages.load("crossfit")
    if arrays is None:
        cost_alpha, explained = fit_cost_alpha(kernel, scale, fold, squared_norm)
        target, alpha = columns_of(fit.score, scale, found.shrinkage, cost_alpha)
        crossed = _centred_predictions(found, cross_fit(kernel, target, alpha, fold), mean_score)
        stages.log(stage="crossfit", cost_alpha=cost_alpha, cost_variance_explained=explained)
        arrays = stages.save("crossfit", cost_alpha=cost_alpha, plain=crossed.plain, nested=crossed.nested)
    cost_dual = solve_columns(kernel, scale - scale.mean(), np.array([float(arrays["cost_alpha"])]))
    hashed = predictor.build_table(
        found.features, block_weight, np.concatenate([found.dual, _padded(cost_dual, len(found.dual))], axis=1),
        np.append(mean, scale.mean()), candidates + 1 + config.extra_dim, config.seed,
    )  # fmt: skip
    size = np.diag(hashed.weight[: candidates + 1]).astype(np.float64)
    svd = hashed.encode(fit.prompts)[:, candidates + 1 :]

    def embed_columns(centred: FloatArray) -> NDArray[np.float32]:
        others = np.broadcast_to(svd, (*centred.shape[:-1], svd.shape[1]))
        return np.concatenate([centred / size, others], axis=-1).astype(np.float32)

    plain, nested = (
        through_link(arrays[name][..., :-1] + mean, mean_score, found.link) for name in ("plain", "nested")
    )
    price = fit.cost_usd.mean(axis=0)
    unit, kappa = cost_unit_and_scale(plain, price)
    problem = Problem(
        fit, fold, price, unit, kappa, embed_columns(arrays["plain"]), plain, embed_columns(arrays["nested"]), nested
    )
    tick("table")
    return Predictor(linked(hashed), plain, problem.z, tried, problem)


def embedded(
    source: EncoderSource, texts: Sequence[str], stages: Stages, tick: Callable[[str], None], device: str
) -> dict[str, NDArray[np.float32]]:
    """Embeddings of distinct texts by text, made once; calls ``tick`` 100 times at most."""
    # they depend on neither seed nor labels
    made = stages.beside("embeddings", embeddings_key(source, texts))
    whole = made.load("whole")
    if whole is None:
        begun = made.load("begun")
        h = embed(
            source, texts, lambda: tick("embed"), device,
            begun=None if begun is None else begun["h"], keep=lambda part: made.save("begun", h=part),
        )  # fmt: skip
        whole = made.save("whole", h=h)
        made.drop("begun")
    return dict(zip(texts, whole["h"], strict=True))


def fit_frozen_predictor(
    config: TrainConfig, division: Division, source: EncoderSource, stages: Stages, tick: Callable[[str], None]
) -> Predictor:
    """Embed every text, and regress; calls ``tick`` 101 times."""
    fit = division.fit
    texts = sorted({*fit.prompts, *division.calibration.prompts})
    embeddings = embedded(source, texts, stages, tick, config.device)
    h = np.stack([embeddings[text] for text in fit.prompts])
    price = fit.cost_usd.mean(axis=0)
    found = fit_frozen(
        h, fit.score, fold_of(fit.prompts), lambda p: selection_cost(p, price, fit), config.alphas, config.variants,
        config.links,
    )  # fmt: skip
    for trial in found.trials:
        stages.log(stage="search", **asdict(trial))
    tick("search")
    tried = [{"block_weight": (), "cost_usd": found.chosen.cost_usd, "error": found.chosen.error}]
    encoder = FrozenPredictor(source, embeddings, found.weight, found.bias, found.link)
    return Predictor(encoder, found.p, h, tried, None)
