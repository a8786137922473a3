"""What equal accuracy costs: our predictor beside the baselines, under one decision rule.

    python benchmarks/cost.py --data DIR --checkpoint CKPT [--data DIR --checkpoint CKPT ...] [--json]

Every predictor p gives the policies argmax p_i - w c_i (c: mean prices of the fit rows) for all cost weights w. Its
cost at a target is read off the hull of those policies on the evaluated rows, in hindsight, so that predictors are
compared and not their margins. Evaluated are DIR/val.parquet and DIR/test.parquet together: no predictor has seen them,
and hindsight needs no calibration rows. Targets are q = .3 ... .9 of the range between cheapest and best candidate on
the fit rows; where a predictor does not reach one, it pays for the best fixed candidate. Baselines are tuned and fitted
on the fit rows that the checkpoint was trained on. Reported:

- USD per 1,000 queries by data set, method and target (the oracle: its linear programme);
- ours / other: geometric mean over targets and data sets, with a 95 % interval from a paired bootstrap (rows resampled
  within each set, the same for all methods, sets averaged; predictors held fixed).

Exit status 1 where ours costs more than 1.03 x TF-IDF + ridge.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from proteus_fast import Router
from proteus_fast.evaluation.baselines import fit_text_baselines
from proteus_fast.evaluation.metrics import (
    SELECTION_TARGETS,
    bootstrap_costs,
    fixed_curve,
    oracle_cost,
    plug_in_curve,
    relative_targets,
)
from proteus_fast.evaluation.outcomes import OutcomeTable, concatenate, read_division, read_table

FloatArray = NDArray[np.float64]

ACCEPTABLE = 1.03
OURS = "proteus"
# the embedding and p of a row do not depend on it
ANY_TAU = 0.5


@dataclass(frozen=True)
class Method:
    """One method on one set: its costs at the targets, (T,), and under resampling, (draws, T); None without."""

    costs: FloatArray
    resampled: FloatArray | None


@dataclass(frozen=True)
class Ratio:
    """Ours over another, by set and over all sets; the interval is of all sets."""

    other: str
    by_set: dict[str, float]
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class DataSet:
    name: str
    rows: int
    taus: FloatArray
    methods: dict[str, Method]
    settings: dict[str, dict[str, Any]]


def measure(folder: Path, router: Router, draws: int, seed: int) -> DataSet:
    division = read_division(folder)
    names = router.pool.names
    fit = division.fit.with_candidates(names)
    if fit.sha256 != router.checkpoint.config.data_sha256:
        raise ValueError(f"{folder}: expected the fit rows that the checkpoint was trained on, got others")
    val, test = (read_table(folder / f"{split}.parquet").with_candidates(names) for split in ("val", "test"))
    table: OutcomeTable = concatenate(val, test)
    price, best = router.pool.price_usd, router.pool.best_fixed
    taus = relative_targets(router.pool.mean_score, price, SELECTION_TARGETS)
    knn, ridge = fit_text_baselines(fit)
    predicted = {
        OURS: router.snapshot.scores(router.encode(table.prompts), ANY_TAU)[5].astype(np.float64),
        **{baseline.name: baseline.predict(table.prompts) for baseline in (ridge, knn)},
    }
    curves = {name: plug_in_curve(p, price, table) for name, p in predicted.items()} | {"hull": fixed_curve(table)}
    methods = {
        name: Method(curve.costs(taus, table), bootstrap_costs(curve, table, taus, draws, seed))
        for name, curve in curves.items()
    }
    methods["best_fixed"] = Method(np.full(len(taus), table.cost_usd[:, best].mean()), None)
    methods["oracle"] = Method(np.array([oracle_cost(table, float(tau)) for tau in taus]), None)
    settings = {baseline.name: dict(baseline.setting) | {"link": baseline.link} for baseline in (ridge, knn)}
    return DataSet(folder.resolve().name, len(table), taus, methods, settings)


def compare(sets: Sequence[DataSet], other: str) -> Ratio:
    """Geometric mean of cost ratios over targets, then over sets."""
    points: dict[str, float] = {}
    resampled = []
    for one in sets:
        ours, theirs = one.methods[OURS], one.methods[other]
        points[one.name] = float(np.log(ours.costs / theirs.costs).mean())
        if ours.resampled is not None and theirs.resampled is not None:
            resampled.append(np.log(ours.resampled / theirs.resampled).mean(axis=1))
    low, high = np.exp(np.quantile(np.mean(resampled, axis=0), (0.025, 0.975))) if resampled else (np.nan, np.nan)
    return Ratio(
        other,
        {name: float(np.exp(point)) for name, point in points.items()},
        float(np.exp(np.mean(list(points.values())))),
        float(low),
        float(high),
    )


def markdown(sets: Sequence[DataSet], ratios: Sequence[Ratio]) -> str:
    heads = [f"q = {q:.1f}" for q in SELECTION_TARGETS]
    lines = [
        "USD per 1,000 queries at equal accuracy, val + test",
        "",
        f"| set | method | {' | '.join(heads)} |",
        f"| --- | --- |{' ---: |' * len(heads)}",
    ]
    for one in sets:
        for name, method in one.methods.items():
            costs = " | ".join("-" if np.isnan(cost) else f"{1000 * cost:.3f}" for cost in method.costs)
            lines.append(f"| {one.name} ({one.rows}) | {name} | {costs} |")
    names = [one.name for one in sets]
    lines += ["", f"| ours / | {' | '.join(names)} | all | 95 % |", f"| --- |{' ---: |' * (len(names) + 2)}"]
    for ratio in ratios:
        interval = "-" if np.isnan(ratio.low) else f"{ratio.low:.3f} ... {ratio.high:.3f}"
        by_set = " | ".join(f"{ratio.by_set[name]:.3f}" for name in names)
        lines.append(f"| {ratio.other} | {by_set} | {ratio.ratio:.3f} | {interval} |")
    chosen = "; ".join(f"{one.name}: {one.settings}" for one in sets)
    return "\n".join([*lines, "", f"Baselines as tuned: {chosen}"])


def as_json(sets: Sequence[DataSet], ratios: Sequence[Ratio]) -> str:
    tables = [
        {
            "dataset": one.name,
            "rows": one.rows,
            "taus": one.taus.tolist(),
            "cost_usd": {
                name: [None if np.isnan(cost) else cost for cost in method.costs.tolist()]
                for name, method in one.methods.items()
            },
            "settings": one.settings,
        }
        for one in sets
    ]
    plain = [{k: None if v != v else v for k, v in asdict(ratio).items()} for ratio in ratios]
    return json.dumps({"sets": tables, "ours_over": plain}, indent=1, allow_nan=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", required=True, action="append", type=Path, metavar="DIR")
    parser.add_argument(
        "--checkpoint", required=True, action="append", metavar="CKPT", help="one for each --data, in order"
    )
    parser.add_argument("--draws", type=int, default=1000, help="bootstrap samples (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if len(arguments.data) != len(arguments.checkpoint):
        parser.error(f"--checkpoint: expected one for each of {len(arguments.data)} --data")
    names = [folder.resolve().name for folder in arguments.data]
    if len(set(names)) < len(names):
        parser.error(f"--data: expected folders of different names, got {', '.join(names)}")
    pairs = list(zip(arguments.data, arguments.checkpoint, strict=True))
    sets = [
        measure(folder, Router.load(path), arguments.draws, arguments.seed)
        for folder, path in tqdm(pairs, desc="data sets", disable=None)
    ]
    ratios = [compare(sets, name) for name in sets[0].methods if name != OURS]
    print(as_json(sets, ratios) if arguments.json else markdown(sets, ratios))
    return 0 if next(ratio.ratio for ratio in ratios if ratio.other == "tfidf_ridge") <= ACCEPTABLE else 1


if __name__ == "__main__":
    sys.exit(main())
