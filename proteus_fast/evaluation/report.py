"""What a router does on an outcome table, target by target, beside its baselines; as JSON, Markdown and a plot."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from proteus_fast import _core
from proteus_fast.certificate import Guarantee, Status
from proteus_fast.evaluation.baselines import best_fixed, fit_text_baselines
from proteus_fast.evaluation.metrics import (
    LEAK_SHARE,
    RELATIVE_TARGETS,
    hull_cost,
    leak_limit,
    median_correlation,
    oracle_cost,
    realised,
    relative_targets,
    step_choices,
)
from proteus_fast.evaluation.outcomes import Division, OutcomeTable, seen_share, shared_prompts
from proteus_fast.router import Router

Float32 = NDArray[np.float32]
FloatArray = NDArray[np.float64]

_FRONTIER_POINTS = 60
_SHUFFLED = 0.05
_ALARM_ERRORS = 2.0


class LeakError(ValueError):
    """The evaluated rows are known to the router, or a run of ours does better than an honest one can."""


class Baselines(NamedTuple):
    """USD of a query on the evaluated rows; None where the target is out of reach or there is nothing to fit on.

    ``hull_usd`` and ``oracle_usd`` are the least costs of reaching tau in hindsight, ``best_fixed_usd`` the cost of the
    candidate with the best calibration score, the others of baselines certified for tau like the router.
    """

    hull_usd: float | None
    oracle_usd: float | None
    best_fixed_usd: float | None
    knn_usd: float | None
    tfidf_ridge_usd: float | None


@dataclass(frozen=True)
class Row:
    """One target.

    Attributes:
        status: what the router says of tau. certified_floor: None where nothing is promised.
        accuracy, mean_cost_usd: realised on the evaluated rows, by the best effort where tau is INFEASIBLE.
        floor_met: accuracy >= tau. share: of the rows that each candidate got.
    """

    tau: float
    status: str
    certified_floor: float | None
    accuracy: float
    floor_met: bool
    mean_cost_usd: float
    share: dict[str, float]
    baselines: Baselines


@dataclass(frozen=True)
class Frontier:
    """Accuracy and mean cost of several policies, (P,) each, on the evaluated rows."""

    name: str
    accuracy: FloatArray
    cost_usd: FloatArray


@dataclass(frozen=True)
class Report:
    """Everything that ``evaluate`` found.

    Attributes:
        n: evaluated rows. notes: what a reader has to know before believing the figures. alarm: what is to
            be said where an accuracy is beyond the leak limit by more than chance; None where none is.
        fixed: the fixed candidates, in the order of ``candidates``; cheapest and best_fixed index into them, the latter
            the best on the calibration rows, None without them. frontiers: what the plot draws as lines.
    """

    dataset: str
    split: str
    n: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    candidates: tuple[str, ...]
    fixed: Frontier
    cheapest: int
    best_fixed: int | None
    frontiers: tuple[Frontier, ...]
    alarm: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The figures as plain values for ``json.dumps``; what is not there is None."""
        rows = [asdict(row) | {"baselines": row.baselines._asdict()} for row in self.rows]
        return {"dataset": self.dataset, "split": self.split, "n": self.n, "rows": rows}

    def to_markdown(self) -> str:
        """One table, costs in USD per 1,000 queries, and the notes."""
        names = ("tau", "status", "floor", "accuracy", "met", "cost", "hull", "oracle", "best fixed", "kNN", "ridge")
        fixed = (("cheapest candidate", self.cheapest), ("best fixed candidate", self.best_fixed))
        lines = [
            f"{self.dataset}, {self.split}: {self.n} queries; costs in USD per 1,000 queries",
            *(f"{what}: {self._describe(index)}" for what, index in fixed if index is not None),
            "",
            f"| {' | '.join((*names, 'most used'))} |",
            f"| ---: | --- |{' ---: |' * (len(names) - 2)} --- |",
        ]
        for row in self.rows:
            most = sorted(row.share, key=lambda name: -row.share[name])[:2]
            cells = [
                f"{row.tau:.4f}",
                row.status,
                "-" if row.certified_floor is None else f"{row.certified_floor:.3f}",
                f"{row.accuracy:.4f}",
                "yes" if row.floor_met else "no",
                *(_per_1000(cost) for cost in (row.mean_cost_usd, *row.baselines)),
                ", ".join(f"{name} {row.share[name]:.0%}" for name in most if row.share[name] > 0),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join([*lines, *(f"\n{note}" for note in (*self.notes, self.alarm) if note)])

    def _describe(self, index: int) -> str:
        accuracy, cost = self.fixed.accuracy[index], float(self.fixed.cost_usd[index])
        return f"{self.candidates[index]}, accuracy {accuracy:.4f}, cost {_per_1000(cost)}"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw accuracy against mean cost: our path and served targets, fixed candidates, hull, oracle, baselines."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for frontier in self.frontiers:
            ours = frontier.name == "proteus"
            bound = frontier.name in ("hull", "oracle")
            axes.plot(
                1000 * frontier.cost_usd, frontier.accuracy, label=frontier.name, lw=2 if ours else 1.2,
                ls="--" if bound else "-", zorder=3 if ours else 2,
            )  # fmt: skip
        for feasible, marker in ((True, "o"), (False, "x")):
            rows = [row for row in self.rows if (row.status != Status.INFEASIBLE.name) == feasible]
            if rows:
                label = f"proteus, {'feasible' if feasible else 'infeasible'} targets"
                cost = [1000 * row.mean_cost_usd for row in rows]
                axes.scatter(
                    cost, [row.accuracy for row in rows], marker=marker, c="black", s=24, zorder=4, label=label
                )
        axes.scatter(
            1000 * self.fixed.cost_usd, self.fixed.accuracy, marker="s", s=18, c="tab:gray", label="candidates"
        )
        for name, cost, accuracy in zip(self.candidates, self.fixed.cost_usd, self.fixed.accuracy, strict=True):
            axes.annotate(name, (1000 * cost, accuracy), xytext=(3, -7), textcoords="offset points", fontsize=6)
        axes.set_xscale("log" if (self.fixed.cost_usd > 0).all() else "linear")
        axes.set(title=f"{self.dataset}, {self.split}", xlabel="USD per 1,000 queries", ylabel="accuracy")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
        figure.savefig(path, format="png", dpi=120)


def _per_1000(cost_usd: float | None) -> str:
    return "-" if cost_usd is None else f"{1000 * cost_usd:.4g}"


def _none_if_nan(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


class _Contender(NamedTuple):
    """A router and its embeddings of the evaluated rows."""

    name: str
    router: Router
    x: Float32

    def path(self, table: OutcomeTable) -> Frontier:
        """What every step of its path gets and costs."""
        choice = self.router.snapshot.choose_path(self.x, self.router.mode)
        steps = step_choices(choice, _core.row_hash(self.x, self.router.certificate.key))
        figures = np.array([realised(table, step) for step in steps])
        return Frontier(self.name, figures[:, 0], figures[:, 1])

    def cost_usd(self, table: OutcomeTable, tau: float, guarantee: Guarantee) -> float | None:
        """Realised cost at a target; None where it is not feasible."""
        if self.router.feasibility(tau, guarantee).status == Status.INFEASIBLE:
            return None
        return realised(table, self.router.route_batch(self.x, tau, guarantee=guarantee).choice)[1]


def _answer(ours: _Contender, table: OutcomeTable, tau: float, guarantee: Guarantee) -> Row:
    """The router's side of a row; the baselines are filled in later."""
    batch = ours.router.route_batch(ours.x, tau, guarantee=guarantee)
    if (batch.choice < 0).any():
        raise ValueError(f"x: expected rows that can be decided, got INVALID at row {int(np.argmin(batch.choice))}")
    accuracy, cost = realised(table, batch.choice)
    counts = np.bincount(batch.choice, minlength=len(ours.router.pool))
    floor = float(batch.certified_floor[0])
    return Row(
        tau=tau,
        status=Status(int(batch.status[0])).name,
        certified_floor=None if np.isnan(floor) else round(floor, 3),
        accuracy=accuracy,
        floor_met=accuracy >= tau,
        mean_cost_usd=cost,
        share={name: int(count) / len(table) for name, count in zip(ours.router.pool.names, counts, strict=True)},
        baselines=Baselines(None, None, None, None, None),
    )


def _bounds(table: OutcomeTable, price_usd: FloatArray) -> list[Frontier]:
    """Hull and oracle as lines, from the accuracy of the cheapest candidate up."""
    means = table.score.mean(axis=0)
    low = float(means[np.argmin(price_usd)])
    found = []
    for name, cost_of, high in (
        ("hull", hull_cost, float(means.max())),
        ("oracle", oracle_cost, float(table.score.max(axis=1).mean())),
    ):
        accuracy = np.linspace(low, high, _FRONTIER_POINTS)
        # the last point is a rounding away from out of reach
        cost = np.array([cost_of(table, float(tau) - 1e-12) for tau in accuracy])
        found.append(Frontier(name, accuracy, cost))
    return found


def _check_split(table: OutcomeTable, split: str, division: Division) -> None:
    if split in ("train", "val"):
        return
    crossing = shared_prompts(table.prompts, division.fit.prompts + division.calibration.prompts)
    if crossing:
        raise LeakError(f"{table.name}/{split}: expected no prompt of train or val, got {len(crossing)} of them")


def _alarm(table: OutcomeTable, tau: float, choice: NDArray[np.int32]) -> str | None:
    """What is to be said where the rows of one target are beyond the leak limit by more than chance."""
    accuracy, limit = realised(table, choice)[0], leak_limit(table)
    best = int(table.score.mean(axis=0).argmax())
    # row by row, its score less what makes the limit
    limits = table.score[:, best] + LEAK_SHARE * (table.score.max(axis=1) - table.score[:, best])
    beyond = table.score[np.arange(len(table)), choice] - limits
    error = float(beyond.std()) / np.sqrt(len(table))
    if beyond.mean() <= max(_ALARM_ERRORS * error, 1e-9):
        return None
    return (
        f"accuracy {accuracy:.4f} at tau {tau:g}, more than {_ALARM_ERRORS:g} standard errors beyond {limit:.4f}, best"
        f" fixed + {LEAK_SHARE:.0%} of the gap to the oracle: labels may have reached the router. Candidates that are"
        " good at queries of different kinds, which the router tells apart, get there honestly."
    )


def _notes(router: Router, table: OutcomeTable, split: str, division: Division | None) -> list[str]:
    notes = []
    seen = seen_share(table.prompts, router.checkpoint.config.prompt_sketch)
    if split in ("train", "val") or table.sha256 == router.certificate.data_sha256:
        notes.append(f"The router has seen {split}: these are not held-out figures.")
    elif seen > 0.0:
        notes.append(f"The router was trained on about {seen:.1%} of these queries: these are not held-out figures.")
    if division is None:
        notes.append("No train and val rows beside the evaluated ones: no baseline was fitted.")
    elif division.calibration.with_candidates(router.pool.names).sha256 != router.certificate.data_sha256:
        notes.append("The router was certified on other rows than the baselines.")
    correlation = median_correlation(table.score)
    if abs(correlation) < _SHUFFLED and len(table) >= 100:
        notes.append(
            f"The candidates' scores are hardly correlated (median {correlation:.3f}): their rows may be shuffled, and "
            "the oracle is not to be trusted."
        )
    return notes


def evaluate(
    router: Router,
    table: OutcomeTable,
    taus: Sequence[float] | None = None,
    *,
    split: str = "test",
    division: Division | None = None,
    guarantee: Guarantee = "certified",
    x: Float32 | None = None,
    progress: Callable[[], Any] = lambda: None,
) -> Report:
    """Route every row of a table at every target and compare.

    Args:
        router: its default mode is evaluated. table: with at least the router's candidates. taus: targets in [0, 1];
            None: a_cheap + q (a_best - a_cheap) for q = .1 ... 1, by the accuracies that the checkpoint has of its
            training rows. split: which rows these are; those of ``train`` and ``val`` may be evaluated by that name.
        division: rows to fit the text baselines on and certify them with; None: without them.
        guarantee: also of the baselines. x: embeddings of the rows, (n, D); None: the router encodes the prompts.
        progress: called three times while baselines are fitted.

    Returns:
        The report, with an alarm where an accuracy is beyond ``metrics.leak_limit`` by more than two standard errors.

    Raises:
        LeakError: prompts of other splits among the rows.
        ValueError: the table lacks a candidate, or a target is not in [0, 1].
    """
    names = router.pool.names
    table = table.with_candidates(names)
    if division is not None:
        division = Division(division.fit.with_candidates(names), division.calibration.with_candidates(names))
        _check_split(table, split, division)
    if taus is None:
        taus = relative_targets(router.pool.mean_score, router.pool.price_usd, RELATIVE_TARGETS).round(6).tolist()
    ours = _Contender("proteus", router, router.encode(table.prompts) if x is None else x)
    answers = [_answer(ours, table, float(tau), guarantee) for tau in taus]
    top = max(answers, key=lambda row: row.accuracy)
    alarm = _alarm(table, top.tau, router.route_batch(ours.x, top.tau, guarantee=guarantee).choice)
    others: list[_Contender] = []
    best: int | None = None
    if division is not None:
        evidence = router.certificate
        for baseline in fit_text_baselines(division.fit, progress):
            certified = baseline.certified(division, delta=evidence.delta, seed=evidence.rounding_seed)
            others.append(_Contender(baseline.name, certified, baseline.predict(table.prompts).astype(np.float32)))
        best = best_fixed(division.calibration)
    means = Frontier("candidates", table.score.mean(axis=0), table.cost_usd.mean(axis=0))
    rows = []
    for row in answers:
        costs = {other.name: other.cost_usd(table, row.tau, guarantee) for other in others}
        baselines = Baselines(
            _none_if_nan(hull_cost(table, row.tau)), _none_if_nan(oracle_cost(table, row.tau)),
            None if best is None else float(means.cost_usd[best]), costs.get("knn"), costs.get("tfidf_ridge"),
        )  # fmt: skip
        rows.append(replace(row, baselines=baselines))
    return Report(
        dataset=table.name,
        split=split,
        n=len(table),
        rows=tuple(rows),
        notes=tuple(_notes(router, table, split, division)),
        candidates=names,
        fixed=means,
        cheapest=router.pool.cheapest,
        best_fixed=best,
        frontiers=(*(contender.path(table) for contender in (ours, *others)), *_bounds(table, router.pool.price_usd)),
        alarm=alarm,
    )
