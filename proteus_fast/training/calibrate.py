"""From a path and calibration rows to a certificate, through the engine that will serve it."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from proteus_fast import _core
from proteus_fast.certificate import (
    Certificate,
    Mode,
    Path,
    PathCertificate,
    build_dual_path,
    check_delta,
    check_seed,
    cost_scale,
    count_successes,
    round_scores,
)
from proteus_fast.checkpoint import Array, Checkpoint, Config
from proteus_fast.encoder import EncoderSource
from proteus_fast.evaluation.outcomes import OutcomeTable, prompt_sketch, seen_share
from proteus_fast.pool import Candidate, Pool
from proteus_fast.router import Router

_MOST_SEEN = 0.1
DUAL_GAMMA = 4.0
"""Cost sensitivity of a router without a policy: with b = 0 it only spaces the preferences along the path."""


def mixing_key(seed: int) -> int:
    """Key of the mixing hash; it depends on the seed alone, so that no label can have shaped it."""
    return int.from_bytes(hashlib.sha256(f"proteus-fast mixing key {seed}".encode()).digest()[:8], "little")


def calibrate(
    config: Config,
    tensors: Mapping[str, Array],
    paths: Mapping[Mode, Path],
    table: OutcomeTable,
    *,
    delta: float,
    seed: int,
    x: NDArray[np.float32] | None = None,
) -> Certificate:
    """Count what every step of every path gets right on the calibration rows, once.

    Args:
        config, tensors: the router. paths: fixed before this call, without these rows' labels. table: calibration rows,
            candidates in the pool's order. delta: error probability. seed: of the key and the rounding of graded
            scores.
        x: embeddings of the rows, (n, D); None: the router encodes them.
    """
    key = mixing_key(seed)
    facts: dict[str, Any] = {
        "delta": delta,
        "n": len(table),
        "data_sha256": table.sha256,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "rounding_seed": seed,
        "key": key,
    }
    uncounted = {mode: PathCertificate(path, np.zeros(len(path.code), np.int64)) for mode, path in paths.items()}
    router = Router(Checkpoint(config, tensors, Certificate.build(uncounted, **facts)))
    embeddings = router.encode(table.prompts) if x is None else x
    outcome = round_scores(table.score, seed)
    u = _core.row_hash(embeddings, key)
    counted: dict[Mode, PathCertificate] = {}
    for mode, path in paths.items():
        choice = router.snapshot.choose_path(embeddings, mode)
        if (choice < 0).any():
            row = int(np.flatnonzero((choice < 0).any(axis=0))[0])
            raise ValueError(f"x: expected embeddings that can be routed, got others in calibration row {row}")
        counted[mode] = PathCertificate(path, count_successes(path, choice, outcome, u))
    return Certificate.build(counted, **facts)


def pool_of(table: OutcomeTable) -> Pool:
    """Candidates of a table with their mean cost and mean score."""
    figures = zip(table.candidates, table.cost_usd.mean(axis=0), table.score.mean(axis=0), strict=True)
    return Pool(Candidate(name, float(price), float(score)) for name, price, score in figures)


def cost_unit_and_scale(p: NDArray[np.float64], price_usd: NDArray[np.float64]) -> tuple[float, float]:
    """The cost unit in USD, the largest mean cost, and kappa for out-of-fold predictions p (n, K)."""
    unit = max(float(price_usd.max()), 1e-12)
    return unit, cost_scale(np.clip(p, 0.0, 1.0), price_usd / unit)


@dataclass(frozen=True)
class PolicyPart:
    """What a trained policy adds to a checkpoint: tensors ``policy.*``, head, gamma, its path, the default mode."""

    tensors: Mapping[str, Array]
    head: Literal["residual", "free"]
    gamma: float
    path: Path
    mode: Mode


def plug_in_checkpoint(
    fit: OutcomeTable,
    p: NDArray[np.float64],
    calibration: OutcomeTable,
    x: NDArray[np.float32],
    tensors: Mapping[str, Array] | None = None,
    *,
    encoder: tuple[float, ...] = (),
    source: EncoderSource | None = None,
    predicted: NDArray[np.bool_] | None = None,
    link: str = "clip",
    delta: float,
    seed: int,
    policy: PolicyPart | None = None,
    label_definition: str = "score of the outcome table, a mean of which is accuracy",
) -> Checkpoint:
    """Certify the plug-in rule of any predictor: ours and the baselines' go through this one function.

    Args:
        fit: rows that the predictor was trained on. p: its out-of-fold predictions there, (n, K). calibration: rows
            that nothing has read. x: embeddings of the calibration rows, (m, D); without ``tensors``, their predicted
            accuracies themselves, (m, K). tensors: the router's. encoder: block weights where it has the hash encoder.
        predicted: bool, which of the fit rows ``p`` has, (n,); None: all.
        source: of its transformer, where it has one. policy: a policy over the same predictor, certified beside the
            plug-in rule.
    """
    candidates = len(fit.candidates)
    if tensors is None:
        tensors = {
            "predictor.weight": np.eye(candidates, dtype=np.float32),
            "predictor.bias": np.zeros(candidates, np.float32),
        }
    # prices and mean scores are of all rows that were fitted, the path of those that were predicted honestly
    pool, score = pool_of(fit), fit.score if predicted is None else fit.score[predicted]
    unit, kappa = cost_unit_and_scale(p, pool.price_usd)
    gamma = DUAL_GAMMA if policy is None else policy.gamma
    config = Config(
        pool=pool,
        encoder="transformer" if source is not None else "hash" if encoder else "none",
        input_dim=x.shape[1],
        projection="mlp" if "projection.w1" in tensors else "none",
        link="sigmoid" if link == "sigmoid" else "clip",
        head=None if policy is None else policy.head,
        mode="dual" if policy is None else policy.mode,
        kappa=kappa,
        gamma=gamma,
        cost_unit_usd=unit,
        block_weight=encoder,
        label_definition=label_definition,
        data_set=fit.name,
        data_sha256=fit.sha256,
        rows=len(fit),
        source=source,
        prompt_sketch=prompt_sketch(fit.prompts),
    )
    paths: dict[Mode, Path] = {
        "dual": build_dual_path(
            np.clip(p, 0.0, 1.0), score, pool.price_usd, cost_unit_usd=unit, kappa=kappa, gamma=gamma
        )
    }
    if policy is not None:
        paths["policy"] = policy.path
        tensors = {**tensors, **policy.tensors}
    table = calibration.with_candidates(pool.names)
    certificate = calibrate(config, tensors, paths, table, delta=delta, seed=seed, x=x)
    return Checkpoint(config, tensors, certificate)


def recertify(source: Checkpoint, table: OutcomeTable, *, delta: float, seed: int) -> Checkpoint:
    """The same router with a certificate from other labelled queries; its paths stay what they are.

    Args:
        source: a router with a text encoder. table: queries that nothing of the router was chosen on. delta: error
            probability. seed: of the rounding of graded scores; to be fixed before the table is looked at, as the best
            of several seeds promises too much.

    Raises:
        ValueError: the table lacks a candidate, more than a tenth of its prompts are of the training rows, or the
            router cannot encode texts.
    """
    check_delta(delta)
    check_seed(seed)
    share = seen_share(table.prompts, source.config.prompt_sketch)
    if share > _MOST_SEEN:
        raise ValueError(f"table: expected queries that the router was not trained on, got {share:.0%} of its own")
    paths = {mode: entry.path for mode, entry in source.certificate.paths.items()}
    rows = table.with_candidates(source.config.pool.names)
    certificate = calibrate(source.config, source.tensors, paths, rows, delta=delta, seed=seed)
    return Checkpoint(source.config, source.tensors, certificate)
