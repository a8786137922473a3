"""The dual variable by itself.

- ``convergence``: does lambda settle in sessions of one fixed target, the paper's first experiment?
- ``alarm``: how soon is a target that cannot be met found out, and how often is one that can be taken for it?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from proteus_fast.evaluation.metrics import relative_targets
from proteus_fast.experiments.policies import INDEXED, SCALAR
from proteus_fast.experiments.study import FloatArray, Progress, Result, Study, run_all, show
from proteus_fast.training.fit_policy import Problem, start_of
from proteus_fast.training.ppo import Dual, PolicyConfig, Trainer, build_network
from proteus_fast.training.start import Start
from proteus_kernels.reference import interpolate_ref

SESSION_TARGETS = (0.3, 0.5, 0.7, 0.9)
"""q of the fixed targets; lambda = 0 may be enough below .9."""
WINDOW = 25
"""Batches of the running accuracy."""
WITHIN = 0.01
"""A point: how near counts as settled, and how far below the reach a target can be met without doubt."""
EXCESS = (0.0, 0.01, 0.02, 0.04)
"""How far the highest knot lies above what the plug-in rule reaches."""
TRAINING = INDEXED.steps
_NARROW = 1e-3


class SessionDual(Dual):
    """One lambda for sessions that all have the same target.

    Attributes:
        violation, moved: mean of tau - accuracy before every dual step, and lambda after it.
    """

    def __init__(self, config: PolicyConfig, start: Start, largest_difference: float) -> None:
        super().__init__(config, start, largest_difference)
        self.violation: list[float] = []
        self.moved: list[float] = []

    def shares(self, tau: Tensor) -> Tensor:
        """Every knot sees every row, (B, N)."""
        return torch.full((len(tau), len(self.knots)), 1.0 / len(self.knots))

    def update(self, violation: Tensor, seen: Tensor) -> None:
        """One dual step, kept for the record."""
        super().update(violation, seen)
        self.keep(violation)

    def keep(self, violation: Tensor) -> None:
        """Write a step down."""
        self.violation.append(float(violation.mean()))
        self.moved.append(float(self.value.mean()))


class PidDual(SessionDual):
    """lambda = [I + k_p v + k_d [v - v']+]+ with I <- [I + k_i v]+ (Stooke, Achiam and Abbeel 2020, algorithm 2).

    v is the violation and v' the one before; I starts at the first lambda. Only a growing violation counts in the
    derivative, as there. k_i is the paper's step, so that what differs is the other two.
    """

    k_i, k_p, k_d = 0.4, 4.0, 4.0

    def __init__(self, config: PolicyConfig, start: Start, largest_difference: float) -> None:
        super().__init__(config, start, largest_difference)
        self.integral = self.value.clone()
        self.before: Tensor | None = None

    def update(self, violation: Tensor, seen: Tensor) -> None:
        """One dual step; all knots have rows."""
        # for the cusum; the value that it sets is replaced
        Dual.update(self, violation, seen)
        rise = torch.zeros_like(violation) if self.before is None else (violation - self.before).clamp_min(0.0)
        self.integral = (self.integral + self.k_i * violation).clamp(0.0, self.cap)
        self.value = (self.integral + self.k_p * violation + self.k_d * rise).clamp(0.0, self.cap)
        self.before = violation.clone()
        self.keep(violation)


class Form(NamedTuple):
    """A policy and the dual of its sessions."""

    name: str
    config: PolicyConfig
    kind: type[SessionDual]


FORMS = (
    Form("additive .1", replace(SCALAR, scalar_step=0.1), SessionDual),
    Form("additive .4", replace(SCALAR, scalar_step=0.4), SessionDual),
    Form("additive 1.0", replace(SCALAR, scalar_step=1.0), SessionDual),
    Form("PID", SCALAR, PidDual),
    Form("logarithmic 2", INDEXED, SessionDual),
)
"""The paper's policy with its free head, since the residual head starts at the answer for tau; last our default."""


def trainer_of(problem: Problem, config: PolicyConfig, start: Start, dual: Dual, seed: int) -> Trainer:
    """A run on all fit rows with a dual of its own."""
    rows = problem.rows()
    return Trainer(build_network(rows, config, start, seed), rows, config, dual, kappa=problem.kappa, seed=seed)


def largest_difference(problem: Problem) -> float:
    """Between the mean costs of two candidates, in cost units."""
    return max(float(problem.price_usd.max() - problem.price_usd.min()) / problem.unit_usd, 1e-6)


def run_session(problem: Problem, form: Form, tau: float, seed: int) -> SessionDual:
    """Train a policy with all sessions at one target; the dual has what happened."""
    start = start_of(problem, form.config)
    log_weight = interpolate_ref(torch.tensor([tau]), start.tau, start.weight.log())
    # sessions spread over the dual's knots, so those are all but one target; the network keeps those of the whole range
    narrow = torch.linspace(tau - _NARROW, tau + _NARROW, len(start.tau))
    at_tau = start._replace(tau=narrow, weight=log_weight.exp().expand_as(narrow))
    dual = form.kind(form.config, at_tau, largest_difference(problem))
    trainer_of(problem, form.config, start, dual, seed).train(form.config.steps)
    return dual


class Settled(NamedTuple):
    """A session in figures.

    within, kept: batches until the running accuracy stays within a point of tau, and until it stays above tau less a
    point; NaN: it does not. final: last running tau - accuracy. dual: mean lambda over the last third. oscillation: its
    standard deviation there over that mean; NaN where lambda is 0. changes: sign changes of the running tau - accuracy.
    """

    within: float
    kept: float
    final: float
    dual: float
    oscillation: float
    changes: int


def running(dual: SessionDual) -> FloatArray:
    """Mean of tau - accuracy over ``WINDOW`` batches, from the first full window on."""
    width = min(max(WINDOW // dual.config.dual_every, 1), len(dual.violation))
    return np.convolve(dual.violation, np.full(width, 1.0 / width), mode="valid")


def stays(holds: NDArray[np.bool_], batches: NDArray[np.int64]) -> float:
    """The batch from which on a claim holds to the end; NaN: it does not hold at the end."""
    failures = np.flatnonzero(~holds)
    if not len(failures):
        return float(batches[0])
    return float("nan") if failures[-1] == len(holds) - 1 else float(batches[failures[-1] + 1])


def settled(dual: SessionDual) -> Settled:
    """Figures of a session."""
    mean = running(dual)
    batches = dual.config.dual_every * (np.arange(len(mean)) + len(dual.moved) - len(mean) + 1)
    last = np.array(dual.moved[-max(len(dual.moved) // 3, 1) :])
    level = float(last.mean())
    signs = np.sign(mean)[mean != 0.0]
    return Settled(
        stays(np.abs(mean) <= WITHIN, batches), stays(mean <= WITHIN, batches), float(mean[-1]), level,
        float(last.std()) / level if level > 1e-6 else float("nan"), int((signs[1:] != signs[:-1]).sum()),
    )  # fmt: skip


def _session_cells(found: Sequence[Settled]) -> tuple[str, ...]:
    def batch(name: str) -> str:
        happened = [value for one in found if np.isfinite(value := getattr(one, name))]
        share = "" if len(happened) == len(found) else f" ({len(happened)} of {len(found)})"
        return f"{np.mean(happened):.0f}{share}" if happened else "never"

    wobble = [one.oscillation for one in found if np.isfinite(one.oscillation)]
    return (
        batch("within"), batch("kept"), show([100 * one.final for one in found], 1),
        show([one.dual for one in found], 2), show(wobble, 2) if wobble else "-",
        show([float(one.changes) for one in found], 0),
    )  # fmt: skip


Sessions = Mapping[tuple[int, int, int], Sequence[SessionDual]]


def convergence(
    studies: Sequence[Study], seeds: int, progress: Progress, *, batches: int = 600, base: PolicyConfig | None = None
) -> Result:
    """Sessions of one fixed target under five duals; ``progress`` is called once a session.

    Args:
        base: gives sizes of networks and batches; None: small networks and one pass over a batch.
    """
    base = base or PolicyConfig(hidden=64, epochs=1)
    sizes = {name: getattr(base, name) for name in ("hidden", "epochs", "sessions", "batch", "minibatch")}
    forms = [form._replace(config=replace(form.config, steps=batches, **sizes)) for form in FORMS]
    found: dict[tuple[int, int, int], list[SessionDual]] = {}
    rows: list[tuple[str, ...]] = []
    figures: dict[str, Any] = {}
    for i, study in enumerate(studies):
        taus = relative_targets(study.problem.table.score.mean(axis=0), study.problem.price_usd, SESSION_TARGETS)
        sessions = []
        for (k, q), (f, form) in product(enumerate(SESSION_TARGETS), enumerate(forms)):
            session = partial(run_session, study.problem, form, float(taus[k]))
            found[i, k, f] = run_all(session, range(seeds), progress)
            runs = [settled(dual) for dual in found[i, k, f]]
            rows.append((study.name, f"{q:g}", f"{taus[k]:.3f}", form.name, *_session_cells(runs)))
            plain = [{n: v if np.isfinite(v) else None for n, v in one._asdict().items()} for one in runs]
            sessions.append({"q": q, "tau": float(taus[k]), "dual": form.name, "seeds": plain})
        # at lambda = 0 the paper's reward is a - c: the plug-in rule with weight 1
        free = float(response_of(study.problem).at(np.ones(1))[0])
        figures[study.name] = {"accuracy_at_lambda_0": free, "sessions": sessions}
    return Result(
        "convergence", "Does the dual settle in sessions of one target?",
        ("data set", "q", "tau", "dual", "within 1 point from batch", "above tau - 1 point from batch",
         "tau - accuracy at the end, points", "lambda", "its deviation / mean", "sign changes"), rows, figures,
        _session_notes(figures, base, batches), lambda figure: _draw_sessions(figure, studies, figures, found),
        {study.name: study.problem.table.sha256 for study in studies}, seeds,
        size=(3.2 * len(SESSION_TARGETS), 4.4 * len(studies)),
    )  # fmt: skip


def _session_notes(figures: Mapping[str, Any], base: PolicyConfig, batches: int) -> tuple[str, ...]:
    def settle(over_met: bool) -> str:
        words = []
        for form in FORMS:
            runs = [
                seed["within"] is not None
                for of in figures.values() for one in of["sessions"] for seed in one["seeds"]
                if one["dual"] == form.name and (one["tau"] < of["accuracy_at_lambda_0"]) == over_met
            ]  # fmt: skip
            words.append(f"{form.name} {sum(runs)} of {len(runs)}")
        return ", ".join(words)

    free = ", ".join(f"{of['accuracy_at_lambda_0']:.3f} on {name}" for name, of in figures.items())
    return (
        f"{batches} batches of {base.sessions} x {base.batch} rows. Accuracy is that of the sampled decisions on "
        f"training rows, as in the paper's experiment, over {WINDOW} batches. All but the last are the paper's policy "
        "with its free head, since the residual head starts at the answer for tau; lambda starts at 1. PID: k_i .4, "
        "k_p 4, k_d 4, not tuned. The last is our default with one lambda: residual head, reward "
        "(-c + lambda (a - tau)) / (1 + lambda), steps of 2 in log lambda, from the dual table.",
        "The paper's reward a - c + lambda (a - tau) pays for accuracy at lambda = 0 too, c being in units of the "
        f"largest mean cost. The plug-in rule then has {free}. A lower target is over-met: lambda falls towards 0 and "
        "accuracy stays above tau, whatever the step. That looks settled, but the target's saving is not made.",
        f"Sessions whose accuracy comes to stay within a point of tau: targets below that, {settle(True)}; above, "
        f"{settle(False)}.",
    )


def _draw_sessions(figure: Any, studies: Sequence[Study], figures: Mapping[str, Any], found: Sessions) -> None:
    axes = figure.subplots(2 * len(studies), len(SESSION_TARGETS), squeeze=False, sharex=True)
    for (i, study), (k, q) in product(enumerate(studies), enumerate(SESSION_TARGETS)):
        above, below = axes[2 * i, k], axes[2 * i + 1, k]
        tau = figures[study.name]["sessions"][k * len(FORMS)]["tau"]
        for f, form in enumerate(FORMS):
            duals = found[i, k, f]
            moved, mean = np.mean([dual.moved for dual in duals], axis=0), np.mean([running(d) for d in duals], axis=0)
            batches = duals[0].config.dual_every * (np.arange(len(moved)) + 1)
            above.plot(batches, moved, label=form.name)
            below.plot(batches[len(moved) - len(mean) :], tau - mean)
        below.axhspan(tau - WITHIN, tau + WITHIN, color="0.9")
        above.set_yscale("symlog", linthresh=1.0)
        above.set(title=f"{study.name}, q = {q:g}", ylabel="" if k else "lambda")
        below.set(xlabel="batches" if i == len(studies) - 1 else "", ylabel="" if k else "running accuracy")
    axes[0, 0].legend(fontsize=7)


class Response(NamedTuple):
    """What the plug-in rule argmax p - c / lambda has out of fold: log(lambda), increasing, and accuracy, (W,) each."""

    log_dual: FloatArray
    accuracy: FloatArray

    def at(self, dual: FloatArray) -> FloatArray:
        """Accuracy for any lambda, linear in its logarithm."""
        return np.interp(np.log(dual), self.log_dual, self.accuracy)

    @property
    def reach(self) -> float:
        """The best accuracy."""
        return float(self.accuracy.max())


def response_of(problem: Problem) -> Response:
    """On the fit rows, with their labels."""
    tried = np.geomspace(min(1e-4, 1e-4 * problem.kappa), problem.kappa, 400)[::-1]
    rows, price = np.arange(len(problem.p)), problem.price_usd / problem.unit_usd
    p = np.clip(problem.p, 0.0, 1.0)
    right = [problem.table.score[rows, np.argmax(p - w * price, axis=1)].mean() for w in tried]
    return Response(-np.log(tried), np.array(right))


def raised_start(start: Start, excess: float) -> Start:
    """A start whose knots end ``excess`` above the reachable range; there the table stays as it is at its end."""
    tau = torch.linspace(float(start.tau[0]), float(start.tau[-1]) + excess, len(start.tau))
    mu, log_weight = (interpolate_ref(tau, start.tau, values) for values in (start.mu, start.weight.log()))
    return Start(tau, mu, log_weight.exp(), start.gamma)


def simulate(response: Response, dual: Dual, config: PolicyConfig, *, runs: int, batches: int, seed: int) -> FloatArray:
    """Batches until the alarm of each knot rises, the policy being the plug-in rule at the present lambda.

    Sessions, batches and dual steps are those of a training. Rows are drawn with replacement, so that the number of
    right ones is binomial with the rule's accuracy; graded scores count as 0 or 1 with that probability.

    Args:
        response: of the rule. dual: at its start; R runs go through it at once. config: sessions and batches.

    Returns:
        (R, N); infinite where it does not rise.
    """
    random = np.random.default_rng(seed)
    knots, size = len(dual.knots), config.batch * config.dual_every
    dual.value, dual.cusum = (values.expand(runs, knots).clone() for values in (dual.value, dual.cusum))
    low, width = float(dual.knots[0]), float(dual.knots[1] - dual.knots[0])
    first = np.full((runs, knots), np.inf)
    tau = shares = torch.zeros(0)
    for step in range(batches // config.dual_every):
        if step * config.dual_every % config.session_batches < config.dual_every:
            # one session in each of equal parts of the knots' range, half a knot's width beyond it at both ends
            part = (np.arange(config.sessions) + random.random((runs, config.sessions))) / config.sessions
            tau = torch.as_tensor(low - 0.5 * width + part * width * knots, dtype=torch.float32)
            shares = dual.shares(tau.reshape(-1)).reshape(runs, config.sessions, knots)
        # Dual.at for many duals: log(1 + lambda) is linear between knots
        now = torch.expm1((shares * torch.log1p(dual.value).unsqueeze(1)).sum(dim=2))
        right = random.binomial(size, response.at(now.double().numpy())) / size
        short = tau - torch.as_tensor(right, dtype=torch.float32)
        weight = shares.sum(dim=1)
        dual.update((shares * short.unsqueeze(2)).sum(dim=1) / weight.clamp_min(1e-9), weight > 0.0)
        first[dual.unsatisfiable.numpy() & np.isinf(first)] = (step + 1) * config.dual_every
    return first


def first_alarms(problem: Problem, config: PolicyConfig, start: Start, seed: int) -> FloatArray:
    """Train, and say after how many batches the alarm of each knot rises, (N,); infinite where it does not."""
    trainer = trainer_of(problem, config, start, Dual(config, start, largest_difference(problem)), seed)
    first = np.full(len(start.tau), np.inf)
    for step in range(config.dual_every, config.steps + 1, config.dual_every):
        trainer.train(step)
        first[trainer.dual.unsatisfiable.numpy() & np.isinf(first)] = step
    return first


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "alarm .1": {"alarm": 0.1},
    "dual step 10": {"dual_step": 10.0},
    "smallest gain .01": {"smallest_gain": 0.01},
    "dual step 10, alarm .1": {"dual_step": 10.0, "alarm": 0.1},
    "smallest gain .01, alarm .1": {"smallest_gain": 0.01, "alarm": 0.1},
}
TRAINED = ("default", "smallest gain .01, alarm .1")


class Watched(NamedTuple):
    """Alarms under one setting at one excess.

    top: batches until the highest knot's, (R,). wrong: runs with one at a knot that can be met.
    """

    top: FloatArray
    wrong: int

    def late(self, share: float) -> float:
        """Batches after which the highest knot's alarm has risen in a share of the runs; infinite where it has not."""
        return float(np.quantile(self.top, share, method="higher"))

    @property
    def limit(self) -> float:
        """Exact one-sided 95 % limit of the share of wrong runs (Clopper and Pearson 1934)."""
        from scipy.stats import beta

        right = len(self.top) - self.wrong
        return float(beta.ppf(0.95, self.wrong + 1, right)) if right else 1.0

    def figures(self) -> dict[str, Any]:
        """For JSON: None where an alarm does not rise."""
        late = {"median": self.late(0.5), "quantile_95": self.late(0.95)}
        return {name: value if np.isfinite(value) else None for name, value in late.items()} | {
            "runs": len(self.top), "within_a_training": float((self.top <= TRAINING).mean()),
            "runs_with_false_alarm": self.wrong, "false_alarm_limit_95": self.limit,
        }  # fmt: skip


def watched(first: FloatArray, start: Start, reach: float, batches: int) -> Watched:
    """What first alarms (R, N) say; false ones count within so many batches."""
    can = start.tau.double().numpy() <= reach - WITHIN
    return Watched(first[:, -1], int((first[:, can] <= batches).any(axis=1).sum()))


Alarms = Mapping[tuple[str, str, float], Watched]


def alarm(
    studies: Sequence[Study], seeds: int, progress: Progress, *, batches: int = 600, base: PolicyConfig | None = None,
    runs: int = 1000, horizon: int = 1500,
) -> Result:  # fmt: skip
    """How soon a target out of reach is found out; ``progress`` is called once a training.

    Args:
        batches: of a training, and those in which a false alarm counts. base: gives sizes as in ``convergence``.
        runs, horizon: simulated runs and their batches.
    """
    base = replace(base or PolicyConfig(hidden=64, epochs=1), steps=batches)
    simulated: dict[tuple[str, str, float], Watched] = {}
    trained: dict[tuple[str, str, float], Watched] = {}
    rows: list[tuple[str, ...]] = []
    figures: dict[str, Any] = {}
    for study, (name, changes) in product(studies, SETTINGS.items()):
        problem, config, response = study.problem, replace(base, **changes), response_of(study.problem)
        spread, plain = largest_difference(problem), start_of(problem, config)
        knots: list[dict[str, Any]] = []
        for excess in EXCESS:
            start, key = raised_start(plain, excess), (study.name, name, excess)
            first = simulate(response, Dual(config, start, spread), config, runs=runs, batches=horizon, seed=0)
            simulated[key] = watched(first, start, response.reach, batches)
            cells: tuple[str, ...] = ("-",) * 4
            knots.append({"excess": excess, "simulated": simulated[key].figures()})
            if name in TRAINED:
                first = np.stack(run_all(partial(first_alarms, problem, config, start), range(seeds), progress))
                trained[key] = watched(first, start, response.reach, batches)
                cells, knots[-1]["trained"] = _cells(trained[key], batches), trained[key].figures()
            rows.append((study.name, name, f"{100 * excess:g}", *_cells(simulated[key], horizon), *cells))
        of = figures.setdefault(study.name, {"reach": response.reach, "settings": {}})
        of["settings"][name] = {
            "accuracy_at_cap": float(response.at(np.array([spread / config.smallest_gain]))[0]), "knots": knots,
        }  # fmt: skip
    four = ("median batch", "95 %", f"by batch {TRAINING}", "false alarms")
    columns = (
        "data set",
        "setting",
        "points above reach",
        *(f"{a}: {b}" for a in ("simulated", "trained") for b in four),
    )
    return Result(
        "alarm", "How soon is a target that cannot be met found out?", columns, rows, figures,
        _alarm_notes(simulated, trained, batches, horizon),
        lambda figure: _draw_alarms(figure, studies, simulated, trained, horizon),
        {study.name: study.problem.table.sha256 for study in studies}, seeds, size=(4.5 * len(studies), 4.5),
    )  # fmt: skip


def _or_beyond(batch: float, horizon: int) -> str:
    return f"{batch:.0f}" if np.isfinite(batch) else f"> {horizon}"


def _cells(one: Watched, horizon: int) -> tuple[str, ...]:
    late, runs = (_or_beyond(one.late(share), horizon) for share in (0.5, 0.95)), len(one.top)
    return *late, f"{(one.top <= TRAINING).sum()} of {runs}", f"{one.wrong} of {runs}"


def _alarm_notes(simulated: Alarms, trained: Alarms, batches: int, horizon: int) -> tuple[str, ...]:
    def late(setting: str, excess: float) -> float:
        return max(one.late(0.95) for key, one in simulated.items() if key[1:] == (setting, excess))

    def limit(setting: str) -> float:
        return max(one.limit for key, one in simulated.items() if key[1] == setting)

    def told(setting: str) -> str:
        batch = ", ".join(_or_beyond(late(setting, excess), horizon) for excess in EXCESS[1:])
        return f"{batch} batches, with false alarms in at most {100 * limit(setting):.1f} % of runs (95 % limit)"

    points = ", ".join(f"{100 * excess:g}" for excess in EXCESS[1:])
    quiet = [setting for setting in SETTINGS if limit(setting) <= 0.01] or ["default"]
    best = min(quiet, key=lambda setting: [late(setting, excess) for excess in EXCESS[1:]])
    risen = [np.isfinite(one.top) for key, one in trained.items() if key[1] == "default" and key[2] > 0.0]
    return (
        "Knots end some points above the best out-of-fold accuracy of the plug-in rule; 0 is the edge, where neither "
        f"answer is wrong. False: an alarm within {batches} batches at a knot {100 * WITHIN:g} point or more "
        "below it. Simulated: the real dual steps with the plug-in rule at 1 / lambda in the policy's place, which "
        "learns at once and does not explore. Trained: whole runs. The alarm is not the paper's.",
        f"With the defaults 95 % of the alarms {points} points above reach have risen, on the slowest data set, after "
        f"{told('default')}. A training has {TRAINING} batches. Trained, the alarm rose in "
        f"{sum(int(one.sum()) for one in risen)} of {sum(len(one) for one in risen)} runs within {batches}; false "
        f"alarms in {sum(one.wrong for one in trained.values())} of {sum(len(one.top) for one in trained.values())}.",
        f"Of the settings tried whose limit is 1 % or less, the quickest {points} points above reach is {best}: "
        f"{told(best)}. What a setting does to the policy's cost is not measured here.",
    )


def _draw_alarms(figure: Any, studies: Sequence[Study], simulated: Alarms, trained: Alarms, horizon: int) -> None:
    axes = figure.subplots(1, len(studies), squeeze=False, sharey=True)[0]
    lines = list(product(zip(TRAINED, ("-", "--"), ("o", "x"), strict=True), enumerate(EXCESS)))
    for axis, study in zip(axes, studies, strict=True):
        for (name, style, dot), (e, excess) in lines:
            top, rose = (np.sort(found[study.name, name, excess].top) for found in (simulated, trained))
            share = (np.arange(len(top)) + 1) / len(top)
            axis.step(top, share, style, color=f"C{e}", label=f"+{100 * excess:g}, {name}")
            axis.plot(rose, (np.arange(len(rose)) + 0.5) / len(rose), dot, color=f"C{e}")
        axis.axvline(TRAINING, color="0.7")
        axis.set(title=study.name, xlabel="batches (lines simulated, marks trained)", xlim=(0, horizon))
    axes[0].set_ylabel("share of runs whose alarm has risen")
    axes[-1].legend(fontsize=7)
