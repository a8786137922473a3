"""How often a certified floor is broken, and how much accuracy the certificate gives away for it.

    python benchmarks/compliance.py CKPT --data DIR [--mode dual|policy] [--json]

The pooled held-out rows DIR/val.parquet and DIR/test.parquet are taken for the population. Calibration sets of n rows
are drawn from it with replacement; for each, the certificate of the checkpoint's path is computed as training computes
it, and the policy that it would serve at a target is held against the target on the whole population. A violation is a
draw whose served policy has population accuracy below the target (of the grid, to which a requested one is rounded up);
a draw that certifies no policy for the target abstains. Reported for q = .1 ... .8 of the range between cheapest and
best candidate on the fit rows, at each delta:

- violations over all draws, goal at most delta + 1 point; abstentions, goal at most 10 %;
- margin: median over the draws that do not abstain of population accuracy - target, in points and as a multiple of the
  normal limit z sqrt(tau (1 - tau) / n), and the mean of that multiple over targets with under 2 % of abstentions;
- calibrated: the same path without a bound: mean of population accuracy - target, and how often it is not negative;
- raw, in policy mode: the policy at tau' = tau, with neither: population accuracy - target.

Graded scores are rounded to 0 or 1 once, for draws and population alike. Certificates of a few draws are compared with
those that the package builds from the drawn rows themselves; a difference ends the run. Exit status 1 where a goal on
violations is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from proteus_fast import Router, _core
from proteus_fast.certificate import (
    TAU_STEPS,
    Certificate,
    Guarantee,
    Mode,
    PathCertificate,
    count_successes,
    critical_count,
    round_scores,
    tau_index,
)
from proteus_fast.certificate import Path as PolicyPath
from proteus_fast.checkpoint import Checkpoint
from proteus_fast.evaluation.metrics import relative_targets, step_choices
from proteus_fast.evaluation.outcomes import concatenate, read_table

DELTAS = (0.1, 0.05)
TARGETS = tuple(q / 10 for q in range(1, 9))
ROWS = {"zeroeval": 1500, "routerbench": 1500}
OTHER_ROWS = 3000
SLACK = 0.01
MOST_ABSTENTIONS = 0.1
FEW_ABSTENTIONS = 0.02
CHECKED_DRAWS = 3
CHUNK = 500


@dataclass(frozen=True)
class Target:
    """What happened at one target over all draws; accuracies relative to tau are in points."""

    q: float
    tau: float
    violations: float
    abstentions: float
    margin_points: float | None
    margin_of_limit: float | None
    calibrated_error_points: float | None
    calibrated_kept: float | None
    raw_error_points: float | None = None

    @property
    def counts(self) -> bool:
        """Whether the target is certified often enough to be claimed."""
        return self.abstentions <= MOST_ABSTENTIONS


@dataclass(frozen=True)
class Result:
    """One delta. ``margin_of_limit`` is the mean over targets with few abstentions."""

    delta: float
    goal: float
    worst_violations: float
    goal_met: bool
    margin_of_limit: float | None
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class Population:
    """Everything that a draw is made of.

    Attributes:
        x: embeddings, (N, D). choice: of every row at every vertex, (V, N). outcome: rounded scores, (N, K).
        u: mixing hash, (N,).
        right: whether each step is right on each row, (S, N) float32 of 0 and 1. accuracy: of every step, (S,).
    """

    x: NDArray[np.float32]
    choice: NDArray[np.int32]
    outcome: NDArray[np.uint8]
    u: NDArray[np.uint64]
    right: NDArray[np.float32]
    accuracy: NDArray[np.float64]


def read_population(router: Router, folder: Path, mode: Mode) -> Population:
    tables = (read_table(folder / f"{split}.parquet").with_candidates(router.pool.names) for split in ("val", "test"))
    table = concatenate(*tables)
    x = router.encode(table.prompts)
    choice = router.snapshot.choose_path(x, mode)
    u = _core.row_hash(x, router.certificate.key)
    outcome = round_scores(table.score, router.certificate.rounding_seed)
    right = outcome[np.arange(len(table)), step_choices(choice, u)].astype(np.float32)
    return Population(x, choice, outcome, u, right, right.mean(axis=1, dtype=np.float64))


def raw_errors(router: Router, population: Population, indices: Sequence[int]) -> list[float]:
    """Population accuracy - target, in points, of the policy whose path is the targets themselves."""
    taus = np.sort(np.unique(indices))[::-1] / TAU_STEPS
    source = router.checkpoint
    path = PolicyPath(taus.astype(np.float32), np.arange(len(taus), 0.0, -1.0))
    entry = PathCertificate(path, np.zeros(len(path.code), np.int64))
    evidence = source.certificate
    certificate = Certificate.build(
        {**evidence.paths, "policy": entry}, delta=evidence.delta, n=evidence.n, data_sha256=evidence.data_sha256,
        date=evidence.date, rounding_seed=evidence.rounding_seed, key=evidence.key,
    )  # fmt: skip
    raw = Router(Checkpoint(source.config, source.tensors, certificate))
    choice = raw.snapshot.choose_path(population.x, "policy")
    accuracy = population.outcome[np.arange(choice.shape[1]), choice].mean(axis=1)
    of_tau = dict(zip(taus.round(3).tolist(), accuracy.tolist(), strict=True))
    return [100 * (of_tau[round(i / TAU_STEPS, 3)] - i / TAU_STEPS) for i in indices]


def draw_successes(population: Population, n: int, draws: int, seed: int) -> NDArray[np.int64]:
    """Right answers of every step in every draw, (draws, S). The rows of draw i come from the seed (seed, i)."""
    size = population.right.shape[1]
    parts = []
    for start in range(0, draws, CHUNK):
        numbers = range(start, min(start + CHUNK, draws))
        counts = [np.bincount(drawn_rows(seed, number, n, size), minlength=size) for number in numbers]
        # whole numbers far below 2^24: exact in float32
        parts.append(np.array(counts, np.float32) @ population.right.T)
    return np.concatenate(parts).astype(np.int64)


def drawn_rows(seed: int, number: int, n: int, size: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, number)).integers(0, size, n)


def served_step(
    reached: NDArray[np.int64], guarantee: Guarantee, n: int, delta: float, index: int
) -> NDArray[np.int64]:
    """Step that is served at a target of the grid in every draw; -1 where the draw abstains.

    Args:
        reached: running minimum of the right answers along the path, (draws, S).
    """
    if guarantee == "certified":
        least = critical_count(n, delta, index / TAU_STEPS)
    else:
        least = int(np.ceil(index * n / TAU_STEPS - 1e-9))
    return np.asarray((reached >= least).sum(axis=1) - 1)


def check_shipped_code(
    router: Router, mode: Mode, population: Population, n: int, seed: int, indices: Sequence[int]
) -> None:
    """Compare a few draws with the package's own certificate of the same rows."""
    path = router.certificate.paths[mode].path
    successes = draw_successes(population, n, CHECKED_DRAWS, seed)
    for number in range(CHECKED_DRAWS):
        rows = drawn_rows(seed, number, n, population.right.shape[1])
        counted = count_successes(path, population.choice[:, rows], population.outcome[rows], population.u[rows])
        if not np.array_equal(counted, successes[number]):
            raise AssertionError(f"draw {number}: expected the counts of count_successes, got others")
        reached = np.minimum.accumulate(successes[[number]], axis=1)
        for delta in DELTAS:
            for guarantee in ("certified", "calibrated"):
                table = PathCertificate(path, counted).table(guarantee, n, delta)
                for index in indices:
                    step = int(served_step(reached, guarantee, n, delta, index)[0])
                    expected = int(table.code[index]) if index <= table.max_index else -1
                    if step != expected:
                        raise AssertionError(f"draw {number}, tau {index}: expected step {expected}, got {step}")


def measure(population: Population, reached: NDArray[np.int64], q: float, index: int, n: int, delta: float) -> Target:
    tau = index / TAU_STEPS
    step = served_step(reached, "certified", n, delta, index)
    served = population.accuracy[step[step >= 0]]
    # accuracies are ratios of whole numbers: one that equals tau keeps it
    violations = float((served < tau - 1e-12).sum() / len(step))
    margin = float(np.median(served) - tau) if served.size else None
    limit = -NormalDist().inv_cdf(delta) * np.sqrt(tau * (1 - tau) / n)
    plain = served_step(reached, "calibrated", n, delta, index)
    error = population.accuracy[plain[plain >= 0]] - tau
    return Target(
        q=q,
        tau=tau,
        violations=violations,
        abstentions=float((step < 0).mean()),
        margin_points=None if margin is None else 100 * margin,
        margin_of_limit=None if margin is None else float(margin / limit),
        calibrated_error_points=float(100 * error.mean()) if error.size else None,
        calibrated_kept=float((error >= -1e-12).mean()) if error.size else None,
    )


def run(router: Router, mode: Mode, folder: Path, n: int, draws: int, seed: int) -> list[Result]:
    population = read_population(router, folder, mode)
    taus = relative_targets(router.pool.mean_score, router.pool.price_usd, TARGETS)
    indices = [tau_index(float(tau)) for tau in taus]
    check_shipped_code(router, mode, population, n, seed, indices)
    reached = np.minimum.accumulate(draw_successes(population, n, draws, seed), axis=1)
    raw = raw_errors(router, population, indices) if mode == "policy" else [None] * len(indices)
    results = []
    for delta in DELTAS:
        targets = tuple(
            replace(measure(population, reached, q, index, n, delta), raw_error_points=error)
            for q, index, error in zip(TARGETS, indices, raw, strict=True)
        )
        worst = max((target.violations for target in targets), default=0.0)
        margins = [
            t.margin_of_limit for t in targets if t.margin_of_limit is not None and t.abstentions < FEW_ABSTENTIONS
        ]
        goal = delta + SLACK
        results.append(Result(delta, goal, worst, worst <= goal, float(np.mean(margins)) if margins else None, targets))
    return results


def markdown(name: str, n: int, draws: int, results: Sequence[Result]) -> str:
    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = []
    for result in results:
        lines += [
            f"{name}, delta {result.delta:g}: n = {n}, {draws} draws",
            f"worst violation rate {result.worst_violations:.3f} (goal {result.goal:.3f}), "
            f"mean margin {cell(result.margin_of_limit, '.3f')} x the normal limit",
            "",
            "| q | tau | violations | abstentions | margin, points | x limit | calibrated error, points | kept |"
            " raw error, points |",
            f"|{' ---: |' * 9}",
        ]
        for target in result.targets:
            cells = [
                f"{target.q:.1f}", f"{target.tau:.3f}", f"{target.violations:.3f}",
                f"{target.abstentions:.3f}{'' if target.counts else ' (not certified)'}",
                cell(target.margin_points, ".2f"), cell(target.margin_of_limit, ".2f"),
                cell(target.calibrated_error_points, "+.2f"), cell(target.calibrated_kept, ".2f"),
                cell(target.raw_error_points, "+.2f"),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("checkpoint", metavar="CKPT")
    parser.add_argument(
        "--data", required=True, type=Path, metavar="DIR", help="folder with val.parquet and test.parquet"
    )
    parser.add_argument("--mode", choices=["dual", "policy"], help="default: the checkpoint's")
    parser.add_argument("--rows", type=int, help="calibration rows of a draw (default 1500 or 3000 by data set)")
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    router = Router.load(arguments.checkpoint)
    name = arguments.data.resolve().name
    n = arguments.rows or ROWS.get(name, OTHER_ROWS)
    mode: Mode = arguments.mode or router.mode
    if mode not in router.certificate.paths:
        parser.error(f"--mode: expected one of {', '.join(router.certificate.paths)}, got {mode}")
    results = run(router, mode, arguments.data, n, arguments.draws, arguments.seed)
    if arguments.json:
        facts: dict[str, Any] = {
            "dataset": name,
            "mode": mode,
            "rows": n,
            "draws": arguments.draws,
            "seed": arguments.seed,
        }
        print(json.dumps(facts | {"results": [asdict(result) for result in results]}, indent=1))
    else:
        print(markdown(f"{name}, {mode}", n, arguments.draws, results))
    return 0 if all(result.goal_met for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
