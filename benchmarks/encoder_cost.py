"""What encoders are worth: cost at equal accuracy, cost at certified targets, and time per query, in one table.

    python benchmarks/encoder_cost.py --set DIR NAME=CKPT NAME=CKPT ... [--set ...] [--mean NAME,NAME] [--markdown FILE]

Each ``--set`` has a data set and the routers trained on its fit rows, each under a name; the first is what the others
are compared with. As in ``cost.py``, cost at equal accuracy is read off the hull of the policies argmax p_i - w c_i for
all w, in hindsight on DIR/val.parquet and DIR/test.parquet together; ``--mean`` adds the mean of two routers' predicted
accuracies. Reported:

- USD per 1,000 queries at q = .3 ... .9 of the range between cheapest and best candidate, and the ratio to the first
  router's: geometric mean over targets, with a 95 % interval from a paired bootstrap (predictors held fixed);
- what the router, as it is served, answers on DIR/test.parquet at the targets q = .3, .5, .7: certified floor,
  accuracy, cost;
- the time of ``router.route`` from text to decision, p50 over texts of the test rows, in this process, with as many
  threads as it is given: OMP_NUM_THREADS=1 for one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from proteus_fast import Router
from proteus_fast.arrays import to_numpy
from proteus_fast.certificate import Status
from proteus_fast.evaluation.metrics import SELECTION_TARGETS, bootstrap_costs, plug_in_curve, relative_targets
from proteus_fast.evaluation.outcomes import OutcomeTable, concatenate, read_division, read_table

FloatArray = NDArray[np.float64]

CERTIFIED = (0.3, 0.5, 0.7)
# the embedding and p of a row do not depend on it
ANY_TAU = 0.5
TIMED = 200


@dataclass(frozen=True)
class Row:
    """One router on one set; ``served`` is empty for a mean of two, which nobody serves."""

    name: str
    costs: FloatArray
    ratio: tuple[float, float, float] | None
    served: tuple[str, ...]
    route_us: float | None


def time_routes(router: Router, texts: Sequence[str]) -> float:
    """p50 of text to decision, in microseconds."""
    router.route(texts[0], ANY_TAU)
    seconds = []
    for text in texts[:TIMED]:
        begin = time.perf_counter()
        router.route(text, ANY_TAU)
        seconds.append(time.perf_counter() - begin)
    return 1e6 * float(np.median(seconds))


def serve(router: Router, h: NDArray[np.float32], test: OutcomeTable, tau: float) -> str:
    """Floor, accuracy and cost of one target on the test rows."""
    batch = router.route_batch(h, tau)
    rows = np.arange(len(test))
    accuracy, cost = test.score[rows, batch.choice].mean(), test.cost_usd[rows, batch.choice].mean()
    floor = f"{batch.certified_floor[0]:.3f}" if batch.status[0] == Status.FEASIBLE else "-"
    return f"{floor} / {accuracy:.3f} / {1000 * cost:.3f}"


def measure(folder: Path, routers: dict[str, Router], mean_of: Sequence[str], draws: int, seed: int) -> list[Row]:
    first = next(iter(routers.values()))
    division = read_division(folder)
    fit = division.fit.with_candidates(first.pool.names)
    val, test = (read_table(folder / f"{split}.parquet").with_candidates(fit.candidates) for split in ("val", "test"))
    table = concatenate(val, test)
    taus = relative_targets(fit.score.mean(axis=0), fit.cost_usd.mean(axis=0), SELECTION_TARGETS)
    targets = relative_targets(fit.score.mean(axis=0), fit.cost_usd.mean(axis=0), CERTIFIED)
    predicted: dict[str, FloatArray] = {}
    served: dict[str, tuple[str, ...]] = {}
    times: dict[str, float] = {}
    for name, router in tqdm(routers.items(), desc=folder.name, disable=None):
        if division.fit.with_candidates(router.pool.names).sha256 != router.checkpoint.config.data_sha256:
            raise ValueError(f"{folder}: expected the fit rows that {name} was trained on, got others")
        if router.pool.names != first.pool.names:
            raise ValueError(f"{name}: expected the candidates of the first router, got others")
        h = to_numpy(router.encode(table.prompts), "embeddings", from_gpu=True)
        predicted[name] = router.snapshot.scores(h, ANY_TAU)[5].astype(np.float64)
        served[name] = tuple(serve(router, h[len(val) :], test, float(tau)) for tau in targets)
        times[name] = time_routes(router, test.prompts)
    if all(name in predicted for name in mean_of) and mean_of:
        predicted[f"mean of {' and '.join(mean_of)}"] = np.mean([predicted[name] for name in mean_of], axis=0)
    rows: list[Row] = []
    base: tuple[FloatArray, FloatArray] | None = None
    for name, p in predicted.items():
        curve = plug_in_curve(p, fit.cost_usd.mean(axis=0), table)
        costs, resampled = curve.costs(taus, table), bootstrap_costs(curve, table, taus, draws, seed)
        ratio = None
        if base is not None:
            low, high = np.exp(np.quantile(np.log(resampled / base[1]).mean(axis=1), (0.025, 0.975)))
            ratio = (float(np.exp(np.log(costs / base[0]).mean())), float(low), float(high))
        else:
            base = costs, resampled
        rows.append(Row(name, costs, ratio, served.get(name, ()), times.get(name)))
    return rows


def markdown(sets: dict[str, list[Row]]) -> str:
    lines = [
        "USD per 1,000 queries at equal accuracy (val + test, hindsight); served: certified floor / accuracy / USD per",
        "1,000 queries, on the test rows at q = .3, .5, .7",
        "",
        "| set | router | q = .3 | .5 | .7 | .9 | ratio (95 %) | served at .3 | .5 | .7 | route, us |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- | --- | --- | --- | ---: |",
    ]
    columns = [int(np.argmin(np.abs(np.asarray(SELECTION_TARGETS) - q))) for q in (0.3, 0.5, 0.7, 0.9)]
    for name, rows in sets.items():
        for row in rows:
            costs = " | ".join(f"{1000 * row.costs[i]:.3f}" for i in columns)
            ratio = "1" if row.ratio is None else f"{row.ratio[0]:.3f} ({row.ratio[1]:.2f} to {row.ratio[2]:.2f})"
            served = " | ".join(row.served or ("-",) * len(CERTIFIED))
            timed = "-" if row.route_us is None else f"{row.route_us:,.0f}"
            lines.append(f"| {name} | {row.name} | {costs} | {ratio} | {served} | {timed} |")
    every = {row.name for rows in sets.values() for row in rows if row.ratio is not None}
    lines += ["", "Geometric mean of the ratios over the sets that have the router:"]
    for name in sorted(every):
        ratios = [row.ratio[0] for rows in sets.values() for row in rows if row.name == name and row.ratio]
        lines.append(f"- {name}: {np.exp(np.log(ratios).mean()):.3f} ({len(ratios)} sets)")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--set", required=True, action="append", nargs="+", metavar=("DIR", "NAME=CKPT"))
    parser.add_argument("--mean", default="", metavar="NAME,NAME", help="also the mean of two routers' predictions")
    parser.add_argument("--draws", type=int, default=500, help="bootstrap samples (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there too")
    arguments = parser.parse_args()
    mean_of = [name for name in arguments.mean.split(",") if name]
    sets = {}
    for folder, *pairs in arguments.set:
        named = dict(pair.partition("=")[::2] for pair in pairs)
        if not named or not all(named.values()):
            parser.error(f"--set: expected DIR NAME=CKPT ..., got {folder} {' '.join(pairs)}")
        place = Path(folder).resolve().name
        if place in sets:
            parser.error(f"--set: expected folders of different names, got {place} twice")
        routers = {name: Router.load(path) for name, path in named.items()}
        sets[place] = measure(Path(folder), routers, mean_of, arguments.draws, arguments.seed)
    text = markdown(sets)
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
