"""What happens after deployment: targets that change, prices that jump, candidates that fail or quietly get worse.

- ``dynamic``: the paper's dynamic tau, inside the feasible range: steps, drift, cycles and a mixture of them.
- ``shocks``: the price of one candidate times .1 and times 10, its outage, and a silent drop of its quality.

The test rows, drawn again and again, play the traffic. A policy is trained for a fixed number of steps and its path is
laid on the fit rows themselves: a certificate holds for any path that was fixed before calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from proteus_fast.answers import RouteBatch
from proteus_fast.certificate import Guarantee, Mode, Status, lay_path
from proteus_fast.checkpoint import Checkpoint
from proteus_fast.evaluation.metrics import realised
from proteus_fast.evaluation.outcomes import OutcomeTable
from proteus_fast.experiments.study import Progress, Result, Study, show
from proteus_fast.router import Router
from proteus_fast.training.calibrate import PolicyPart, calibrate, plug_in_checkpoint
from proteus_fast.training.fit_policy import build_trainer, curve_of, positions_of, run_name, train_to
from proteus_fast.training.policy import decide
from proteus_fast.training.ppo import PolicyConfig, Trainer, follow

FloatArray = NDArray[np.float64]
Pattern = Literal["step", "drift", "cycle", "mixed"]

INDEXED = PolicyConfig()
DELTA = 0.1
QUERIES = 4000
WINDOW = 200
DROP = 0.3
"""Probability that a right answer of the candidate that silently gets worse turns wrong."""

_LEVELS = (0.5, 1.0, 0.0, 0.75, 0.25, 1.0, 0.5, 0.0)
_PERIODS = 4
_NOISE = 1.64
_VERTICES = 64


@dataclass(frozen=True)
class Deployment:
    """A trained policy and the checkpoint around it.

    Attributes:
        trainer: with the policy. source: its checkpoint, default mode ``policy``. embeddings: of the calibration rows.
        seed: of the training, the mixing key and the rounding of graded scores.
    """

    study: Study
    trainer: Trainer
    source: Checkpoint
    embeddings: NDArray[np.float32]
    seed: int

    def router(self, mode: Mode, source: Checkpoint | None = None) -> Router:
        """A router whose default mode is the given one: decisions of any other mode are UNCERTIFIED."""
        source = source or self.source
        return Router(replace(source, config=replace(source.config, mode=mode)))

    def recertified(self, table: OutcomeTable) -> Checkpoint:
        """The same paths under a certificate from other labels of the calibration rows."""
        paths = {mode: entry.path for mode, entry in self.source.certificate.paths.items()}
        certificate = calibrate(
            self.source.config, self.source.tensors, paths, table, delta=DELTA, seed=self.seed, x=self.embeddings
        )
        return replace(self.source, certificate=certificate)


def deploy(study: Study, seed: int, config: PolicyConfig) -> Deployment:
    """Train a policy for ``config.steps`` steps, lay its path on the fit rows, certify it beside the plug-in rule."""
    problem, hashed = study.problem, study.hashed
    trainer = build_trainer(problem, config, seed)
    train_to(trainer, config.steps, run_name(config, seed), study.store, lambda _: None)
    network, positions = trainer.served, positions_of(trainer)
    curve = curve_of(problem.table, follow(network, problem.rows(), positions, trainer.kappa)[0].numpy())
    accuracy, cost = (values.mean(axis=1, dtype=np.float64) for values in (curve.score, curve.cost_usd))
    path = lay_path(positions.numpy(), accuracy, cost, _VERTICES)
    embeddings = hashed.encode(study.division.calibration.prompts)
    tensors = {f"encoder.{name}": getattr(hashed, name) for name in ("table", "row_scale", "idf")}
    tensors |= {"predictor.weight": hashed.weight, "predictor.bias": hashed.bias}
    source = plug_in_checkpoint(
        problem.table, np.clip(problem.p, 0.0, 1.0), study.division.calibration, embeddings, tensors,
        encoder=hashed.block_weight, delta=DELTA, seed=seed,
        policy=PolicyPart(network.tensors(), network.head, float(network.gamma.detach()), path, "policy"),
    )  # fmt: skip
    return Deployment(study, trainer, source, embeddings, seed)


def targets(pattern: Pattern, queries: int, low: float, high: float, seed: int = 0) -> FloatArray:
    """Targets of a stream, one a query, within [low, high], (queries,).

    ``step``: eight levels, each for an eighth of the stream. ``drift``: from low to high, evenly. ``cycle``: four
    periods of a sine. ``mixed``: a quarter each of steps, of drift from high to low, of one period of the sine, and of
    a target of its own for each query.
    """
    position = np.arange(queries) / max(queries, 1)
    if pattern == "step":
        share = np.array(_LEVELS)[(position * len(_LEVELS)).astype(int)]
    elif pattern == "drift":
        share = position
    elif pattern == "cycle":
        share = 0.5 + 0.5 * np.sin(2.0 * np.pi * _PERIODS * position)
    else:
        quarter = np.arange(-(-queries // 4)) / max(queries / 4, 1)
        steps = np.array(_LEVELS)[(quarter * len(_LEVELS)).astype(int)]
        each = np.random.default_rng(seed).random(len(quarter))
        parts = (steps, 1.0 - quarter, 0.5 + 0.5 * np.sin(2.0 * np.pi * quarter), each)
        share = np.concatenate(parts)[:queries]
    return np.asarray(low + share.clip(0.0, 1.0) * (high - low), np.float64)


def feasible_range(deployment: Deployment) -> tuple[float, float]:
    """From q = .1 to q = .9, or to the largest target that both modes certify where that is lower.

    Raises:
        ValueError: there is nothing certified above q = .1.
    """
    study, certificate = deployment.study, deployment.source.certificate
    largest = min(certificate.tau_max("policy") or 0.0, certificate.tau_max("dual") or 0.0)
    low, high = float(study.taus[0]), min(float(study.taus[-1]), largest)
    if high <= low:
        raise ValueError(f"{study.name}: expected certified targets above {low:.4f}, got {largest:.4f} at most")
    return low, high


_SERVED = ("policy, raw", "policy, calibrated", "policy, certified", "dual, certified")
_MEASURES = ("met", "met_within_noise", "excess", "cost_ratio")


def _choices(deployment: Deployment, rows: NDArray[np.int64], tau: FloatArray) -> dict[str, NDArray[np.int64]]:
    """What each of ``_SERVED`` chooses for a stream of test rows with their targets, (queries,) each."""
    study, trainer = deployment.study, deployment.trainer
    found: dict[str, NDArray[np.int64]] = {}
    with torch.no_grad():
        stream, network = study.rows.take(torch.from_numpy(rows)), trainer.served
        mu = network(stream.z, torch.as_tensor(tau, dtype=torch.float32)).mu
        found["policy, raw"] = decide(network, stream.p, mu, stream.price, trainer.kappa).numpy()
    x = study.rows.z.numpy()[rows]
    served: tuple[tuple[str, Mode, Guarantee], ...] = (
        ("policy, calibrated", "policy", "calibrated"),
        ("policy, certified", "policy", "certified"),
        ("dual, certified", "dual", "certified"),
    )
    for name, mode, guarantee in served:
        answer = deployment.router(mode).route_batch(x, tau, guarantee=guarantee, strict=True)
        found[name] = answer.choice.astype(np.int64)
    return found


class Stream(NamedTuple):
    """One pattern served by one policy.

    met: share of windows whose mean accuracy is at or above their mean tau. met_within_noise: the same less 1.64
    standard deviations of a window's mean. excess: mean accuracy - mean tau. cost_ratio: mean cost over that of the
    best fixed candidate. score: of each query, (queries,).
    """

    met: float
    met_within_noise: float
    excess: float
    cost_ratio: float
    score: FloatArray


def score_stream(
    table: OutcomeTable, rows: NDArray[np.int64], choice: NDArray[np.int64], tau: FloatArray, fixed: int, window: int
) -> Stream:
    """Score choices for a stream of a table's rows; see ``Stream``.

    Args:
        fixed: the best fixed candidate on the fit rows. window: queries of one; what is left over is in no window.
    """
    score, cost = table.score[rows, choice], table.cost_usd[rows, choice].mean()
    whole = len(rows) // window * window
    reached, wanted = (values[:whole].reshape(-1, window).mean(axis=1) for values in (score, tau))
    noise = _NOISE * np.sqrt(wanted * (1.0 - wanted) / window)
    return Stream(
        float((reached >= wanted).mean()), float((reached >= wanted - noise).mean()), float(score.mean() - tau.mean()),
        float(cost / max(table.cost_usd[rows, fixed].mean(), 1e-12)), score,
    )  # fmt: skip


class _Streams(NamedTuple):
    """What one deployment did: targets by pattern, and streams by pattern and policy."""

    tau: dict[str, FloatArray]
    found: dict[str, dict[str, Stream]]


def _run_streams(deployment: Deployment, queries: int) -> _Streams:
    study, (low, high) = deployment.study, feasible_range(deployment)
    fixed = int(study.problem.table.score.mean(axis=0).argmax())
    streams = _Streams({}, {})
    for number, pattern in enumerate(get_args(Pattern)):
        rows = np.random.default_rng([deployment.seed, number]).integers(0, len(study.test), queries)
        tau = targets(pattern, queries, low, high, deployment.seed)
        streams.tau[pattern] = tau
        streams.found[pattern] = {
            name: score_stream(study.test, rows, choice, tau, fixed, min(WINDOW, queries))
            for name, choice in _choices(deployment, rows, tau).items()
        }
    return streams


def _jobs(studies: Sequence[Study], seeds: int) -> list[tuple[Study, int]]:
    return [(study, seed) for study in studies for seed in range(seeds)]


def dynamic(
    studies: Sequence[Study], seeds: int, progress: Progress, config: PolicyConfig = INDEXED, queries: int = QUERIES
) -> Result:
    """The paper's dynamic tau: compliance in windows of 200 queries while the target moves."""

    runs: list[_Streams] = []
    for study, seed in _jobs(studies, seeds):
        runs.append(_run_streams(deploy(study, seed, config), queries))
        progress()
    figures: dict[str, Any] = {
        study.name: {
            pattern: {
                name: {
                    measure: [getattr(run.found[pattern][name], measure) for run in runs[i * seeds : (i + 1) * seeds]]
                    for measure in _MEASURES
                }
                for name in _SERVED
            }
            for pattern in get_args(Pattern)
        }
        for i, study in enumerate(studies)
    }

    def cell(pattern: str, name: str, measure: str, scale: float = 1.0, digits: int = 3) -> str:
        """Mean over data sets, seed by seed."""
        values = [figures[study.name][pattern][name][measure] for study in studies]
        return show((scale * np.mean(values, axis=0)).tolist(), digits)

    rows: list[tuple[str, ...]] = [
        (
            pattern, name, cell(pattern, name, "met"), cell(pattern, name, "met_within_noise"),
            cell(pattern, name, "excess", 100.0, 1), cell(pattern, name, "cost_ratio"),
        )
        for pattern in get_args(Pattern)
        for name in _SERVED
    ]  # fmt: skip

    hashes = {study.name: study.problem.table.sha256 for study in studies}

    def draw(figure: Any) -> None:
        _draw_streams(figure, studies[0].name, runs[0], min(WINDOW, queries))

    columns = ("tau", "served", "windows at tau", "within noise", "accuracy - tau, points", "cost / best fixed")
    title = "Targets that change while traffic runs"
    return Result(
        "dynamic", title, columns, rows, figures | {"window": min(WINDOW, queries), "queries": queries},
        _dynamic_notes(studies, figures, queries), draw, hashes, seeds, (10.0, 7.0),
    )  # fmt: skip


def _dynamic_notes(studies: Sequence[Study], figures: dict[str, Any], queries: int) -> tuple[str, ...]:
    window = min(WINDOW, queries)

    def sentence(name: str) -> str:
        met, within, excess = (
            np.mean([figures[study.name][pattern][name][measure] for study in studies for pattern in get_args(Pattern)])
            for measure in _MEASURES[:3]
        )
        return f"{name}: {met:.0%} of windows at tau, {within:.0%} within noise, {100 * excess:+.1f} points from tau."

    spread = max(float(np.sqrt(tau * (1 - tau) / len(study.test))) for study in studies for tau in study.taus)
    sizes = [len(study.test) for study in studies]
    many = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    return (
        f"Streams of {queries} test rows drawn with replacement; windows of {window} queries, side by side. tau stays "
        "between q = .1 and the lower of q = .9 and the largest target that both modes certify. Means over data sets.",
        f"A window of {window} queries carries {100 * np.sqrt(0.85 * 0.15 / window):.1f} points of sampling noise at "
        "accuracy .85 (one standard deviation): a router whose accuracy is tau exactly has half of the windows at or "
        "above tau, and 95 % of them within noise, that is, at or above tau less 1.64 of the window's standard "
        "deviations. A guarantee on the average says no more about single windows than that.",
        f"The traffic is the test table ({many} rows) again and again: its own sampling deviation, up to "
        f"{100 * spread:.1f} points (one standard deviation), is common to all windows of a data set, and no "
        "certificate from other rows can see it.",
        "All patterns: " + " ".join(sentence(name) for name in _SERVED),
        "raw: the policy gets tau itself (tau' = tau), as in the paper. calibrated: tau' is looked "
        "up so that the calibration rows are met on average. certified: they are met with a margin, delta .1.",
        "The router keeps no state, so how tau moves is nothing to it: patterns differ by where targets lie.",
    )


def _draw_streams(figure: Any, study: str, run: _Streams, window: int) -> None:
    """tau and accuracy, both as moving means over a window, one panel a pattern."""
    axes = figure.subplots(2, 2, sharey=True)
    kernel = np.full(window, 1.0 / window)
    for axis, (pattern, tau) in zip(axes.flat, run.tau.items(), strict=True):
        place = np.arange(window, len(tau) + 1)
        for name in ("policy, raw", "policy, certified", "dual, certified"):
            accuracy = np.convolve(run.found[pattern][name].score, kernel, mode="valid")
            axis.plot(place, accuracy, lw=1.0, label=name)
        axis.plot(place, np.convolve(tau, kernel, mode="valid"), color="black", lw=1.4, label="tau")
        axis.set(title=f"{study}, {pattern}", xlabel="query", ylabel=f"mean of the last {window}")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)


class Shock(NamedTuple):
    """One mode at one target after an event.

    status: what the router says of its answers. tau_max: of the certificate in force; None where nothing is certified.
    share: of the queries that go to the candidate. moved: share of the queries whose candidate changed. accuracy,
    cost_usd: realised after the event. unheeded_accuracy, unheeded_cost_usd: the same had the router gone on as before.
    """

    status: str
    tau_max: float | None
    share: float
    moved: float
    accuracy: float
    cost_usd: float
    unheeded_accuracy: float
    unheeded_cost_usd: float


def most_used(deployment: Deployment, tau: float) -> int:
    """The candidate that gets most of the calibration queries at a target, both modes together."""
    names = deployment.source.config.pool.names
    count = np.zeros(len(names), np.int64)
    for mode in get_args(Mode):
        choice = deployment.router(mode).route_batch(deployment.embeddings, tau).choice
        count += np.bincount(choice, minlength=len(names))
    return int(count.argmax())


def worsened(table: OutcomeTable, candidate: int, seed: int) -> OutcomeTable:
    """The table after right answers of one candidate turned wrong, each with probability ``DROP``."""
    score = table.score.copy()
    score[:, candidate] *= np.random.default_rng(seed).random(len(table)) >= DROP
    return replace(table, score=score)


_EVENTS = ("before", "price x 0.1", "price x 10", "outage", "quality drop, silent", "quality drop, re-certified")


def _run_shocks(deployment: Deployment, mode: Mode, tau: float, candidate: int) -> dict[str, Shock]:
    """Every event for one mode."""
    study, router, x = deployment.study, deployment.router(mode), deployment.study.rows.z.numpy()
    test = study.test
    first: NDArray[np.int32] = router.route_batch(x, tau).choice

    def shock(serving: Router, answer: RouteBatch, table: OutcomeTable) -> Shock:
        accuracy, cost = realised(table, answer.choice)
        status = "/".join(Status(int(number)).name for number in np.unique(answer.status))
        return Shock(
            status, serving.certificate.tau_max(mode), float((answer.choice == candidate).mean()),
            float((answer.choice != first).mean()), accuracy, cost, *realised(table, first),
        )  # fmt: skip

    found = {"before": shock(router, router.route_batch(x, tau), test)}
    for factor in (0.1, 10.0):
        change = np.ones(len(router.pool.names))
        change[candidate] = factor
        answer = router.route_batch(x, tau, price_usd=router.pool.price_usd * change)
        found[f"price x {factor:g}"] = shock(router, answer, replace(test, cost_usd=test.cost_usd * change))
    available = np.arange(len(router.pool.names)) != candidate
    # a candidate that is down answers nothing and charges nothing
    down = replace(test, score=test.score * available, cost_usd=test.cost_usd * available)
    found["outage"] = shock(router, router.route_batch(x, tau, available=available), down)
    worse = worsened(test, candidate, deployment.seed + 1)
    found["quality drop, silent"] = shock(router, router.route_batch(x, tau), worse)
    calibration = worsened(study.division.calibration, candidate, deployment.seed + 2)
    renewed = deployment.router(mode, deployment.recertified(calibration))
    found["quality drop, re-certified"] = shock(renewed, renewed.route_batch(x, tau), worse)
    return found


class _Shocks(NamedTuple):
    """What one deployment did: the candidate, and shocks by mode and event."""

    candidate: str
    found: dict[str, dict[str, Shock]]


def shocks(studies: Sequence[Study], seeds: int, progress: Progress, config: PolicyConfig = INDEXED) -> Result:
    """A price jumps, a candidate fails, a candidate quietly gets worse, at the target of q = .5."""

    runs: list[_Shocks] = []
    for study, seed in _jobs(studies, seeds):
        deployment, tau = deploy(study, seed, config), _middle(study)
        candidate = most_used(deployment, tau)
        by_mode = {mode: _run_shocks(deployment, mode, tau, candidate) for mode in get_args(Mode)}
        runs.append(_Shocks(deployment.source.config.pool.names[candidate], by_mode))
        progress()
    rows: list[tuple[str, ...]] = []
    figures: dict[str, Any] = {}
    for i, study in enumerate(studies):
        mine = runs[i * seeds : (i + 1) * seeds]
        entry: dict[str, Any] = {"tau": _middle(study), "candidates": [run.candidate for run in mine]}
        for mode in get_args(Mode):
            by_event = {event: [run.found[mode][event] for run in mine] for event in _EVENTS}
            entry[mode] = {event: [shock._asdict() for shock in found] for event, found in by_event.items()}
            rows += [(study.name, mode, event, *_cells(found)) for event, found in by_event.items()]
        figures[study.name] = entry

    hashes = {study.name: study.problem.table.sha256 for study in studies}

    def draw(figure: Any) -> None:
        _draw_shocks(figure, studies[0], runs[0])

    columns = (
        "set", "mode", "event", "status", "tau_max", "its share", "moved", "accuracy", "unheeded", "USD per 1,000",
        "unheeded",
    )  # fmt: skip
    title = "Prices jump, a candidate fails, a candidate quietly gets worse"
    return Result(
        "shocks", title, columns, rows, figures, _shock_notes(studies, runs, seeds), draw, hashes, seeds,
        (10.0, 4.5),
    )  # fmt: skip


def _middle(study: Study) -> float:
    """The target of q = .5."""
    return float(study.taus[len(study.taus) // 2])


def _cells(found: Sequence[Shock]) -> tuple[str, ...]:
    def cell(name: str, scale: float = 1.0) -> str:
        return show([scale * getattr(shock, name) for shock in found])

    certified = [shock.tau_max for shock in found if shock.tau_max is not None]
    return (
        "/".join(sorted({shock.status for shock in found})),
        show(certified) if certified else "none",
        cell("share"), cell("moved"), cell("accuracy"), cell("unheeded_accuracy"), cell("cost_usd", 1000.0),
        cell("unheeded_cost_usd", 1000.0),
    )  # fmt: skip


def _shock_notes(studies: Sequence[Study], runs: Sequence[_Shocks], seeds: int) -> tuple[str, ...]:
    def mean(event: str, name: str) -> float:
        return float(np.mean([getattr(run.found[mode][event], name) or 0.0 for run in runs for mode in get_args(Mode)]))

    def change(event: str, name: str) -> float:
        return 100.0 * (mean(event, name) - mean("before", name))

    def excess(event: str) -> list[float]:
        """Accuracy - tau in points, of every run and mode."""
        jobs = zip(_jobs(studies, seeds), runs, strict=True)
        both = [(_middle(study), run.found[mode][event]) for (study, _), run in jobs for mode in get_args(Mode)]
        return [100.0 * (shock.accuracy - tau) for tau, shock in both]

    settings = "; ".join(
        f"{study.name}: tau {_middle(study):.3f}, "
        + ", ".join(sorted({run.candidate for run in runs[i * seeds : (i + 1) * seeds]}))
        for i, study in enumerate(studies)
    )
    silent, renewed = "quality drop, silent", "quality drop, re-certified"
    said = sorted({run.found[mode][silent].status for run in runs for mode in get_args(Mode)})
    return (
        "Target q = .5, certified at delta .1; the candidate is the one that gets most calibration queries there "
        f"({settings}). Test rows; costs as recorded, times the price's factor. its share: of the queries, after the "
        "event. unheeded: what the same event does to a router that goes on as before; in an outage its queries to "
        "the candidate are lost, and cost nothing.",
        "Own prices and masks make answers UNCERTIFIED: scores use them at once, but the exchange of accuracy for cost "
        "stays that of the certified prices and pool, and accuracy goes where that leads (mean change "
        f"{change('price x 0.1', 'accuracy'):+.1f} points after x 0.1, {change('price x 10', 'accuracy'):+.1f} after "
        f"x 10, {change('outage', 'accuracy'):+.1f} in the outage, where going on as before would lose "
        f"{-change('outage', 'unheeded_accuracy'):.1f}). The floor returns with a path laid and certified for them.",
        f"Silent drop: right answers of the candidate turn wrong with probability {DROP:g}. Nothing notices it without "
        f"feedback: the status stays {' or '.join(said)} while accuracy changes by {change(silent, 'accuracy'):+.1f} "
        f"points on average and ends up to {-min(excess(silent)):.1f} points below tau.",
        "Re-certification on as many new labels (calibration rows with the drop) does notice: the same target is then "
        f"served {np.mean(excess(renewed)):+.1f} points from tau on average (lowest {min(excess(renewed)):+.1f}), by a "
        "more accurate step of the same path. The predictor still believes in the candidate: until it is trained "
        f"again, that takes {mean(renewed, 'cost_usd') / mean('before', 'cost_usd'):.2f} times the cost. tau_max goes "
        f"from {mean('before', 'tau_max'):.3f} to {mean(renewed, 'tau_max'):.3f}: it falls as far as the most accurate "
        "policy uses the candidate.",
    )


def _draw_shocks(figure: Any, study: Study, run: _Shocks) -> None:
    """Accuracy against cost after every event; a line leads from the router that does not heed it."""
    axes = figure.subplots(1, len(get_args(Mode)), sharey=True, squeeze=False)
    for axis, mode in zip(axes.flat, get_args(Mode), strict=True):
        for number, (event, shock) in enumerate(run.found[mode].items()):
            cost, accuracy = ((shock.unheeded_cost_usd, shock.cost_usd), (shock.unheeded_accuracy, shock.accuracy))
            thousand = [1000.0 * max(value, 1e-12) for value in cost]
            axis.plot(thousand, accuracy, color=f"C{number}", lw=1.0)
            axis.scatter(thousand[1:], accuracy[1:], color=f"C{number}", s=30, label=event, zorder=3)
            axis.scatter(thousand[:1], accuracy[:1], color=f"C{number}", s=22, marker="x")
        axis.axhline(_middle(study), color="black", lw=0.8, ls="--")
        axis.set(title=f"{study.name}, {mode}, {run.candidate}", xlabel="USD per 1,000 queries", xscale="log")
        axis.grid(alpha=0.3)
    axes[0, 0].set(ylabel="accuracy (x: had the router gone on as before)")
    axes[0, 0].legend(fontsize=7)
