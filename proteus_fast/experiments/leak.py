"""A deliberately leaky run: how figures that honest routers do not reach can arise. Nothing here is a result of ours.

One policy, trained and followed in the same way, on inputs of five kinds. One is honest; the others let labels of the
test rows reach the score p_i + mu b_i - kappa (1 - mu)^gamma c_i:

- true scores in place of predicted accuracy p (PROTEUS, Eq. 2, read that way);
- a split by outcome rows, that is, by pairs of prompt and candidate: a predictor fitted with four fifths of the pairs
  of every test prompt;
- a split that leaves test prompts in training: a predictor fitted with all their pairs, once with the penalty that
  looks best on those prompts, once with the penalty that is best out of fold on the fit rows alone.

Beside them stand what fixed candidates and the oracle reach, and whether the leak alarm rises.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from proteus_fast.evaluation.metrics import hull_cost, leak_limit, oracle_cost
from proteus_fast.evaluation.outcomes import OutcomeTable, concatenate
from proteus_fast.experiments.study import Progress, Result, Study, show
from proteus_fast.training.calibrate import cost_unit_and_scale
from proteus_fast.training.fit_policy import Problem, build_trainer, curve_of, positions_of, run_name, to_rows, train_to
from proteus_fast.training.ppo import PolicyConfig, Rows, follow
from proteus_fast.training.predictor import ALPHAS, Float32, gram, hash_features, out_of_fold, solve_duals

FloatArray = NDArray[np.float64]

INDEXED = PolicyConfig()
KNOWN_PAIRS = 0.8
"""Share of the pairs of prompt and candidate that a split by outcome rows puts into training."""

HONEST = "honest"
TRUE_SCORES = "LEAKY: true scores in Eq. 2"
BY_ROWS = "LEAKY: split by outcome rows"
TEST_PROMPTS = "LEAKY: test prompts in training"
QUIET = "LEAKY: test prompts in training, penalty of the honest fit"
VARIANTS = (HONEST, TRUE_SCORES, BY_ROWS, TEST_PROMPTS, QUIET)


class Inputs(NamedTuple):
    """What a policy is trained on and what it is followed on: the fit rows and the test rows.

    prefix: of the name that its run is stored under; it has a hash of what p is on the fit rows.
    """

    problem: Problem
    rows: Rows
    prefix: str


def with_predictions(study: Study, fit_p: FloatArray, test_p: FloatArray) -> Inputs:
    """The study's inputs under other predicted accuracies of the fit rows (n, K) and the test rows (m, K)."""
    problem = replace(study.problem, p=fit_p, kappa=cost_unit_and_scale(fit_p, study.problem.price_usd)[1])
    prefix = f"leaky-{hashlib.sha256(fit_p.tobytes()).hexdigest()[:12]}-"
    return Inputs(problem, to_rows(problem, study.rows.z.numpy(), test_p, study.test), prefix)


@dataclass(frozen=True)
class Leak:
    """Fit and test rows of a study as one training set: what must not be done.

    Attributes:
        table: fit rows, then test rows. kernel: inner products of their features, (n, n). loud: the penalty that is
            most accurate on the test rows whose labels it was given. quiet: the one with the least squared error out of
            fold on the fit rows.
    """

    study: Study
    table: OutcomeTable
    kernel: Float32
    loud: float
    quiet: float

    def predictions(self, alpha: float, known: NDArray[np.bool_] | None = None) -> tuple[FloatArray, FloatArray]:
        """Predicted accuracies of the fit rows and of the test rows by one ridge regression on both.

        Args:
            alpha: penalty. known: pairs whose scores are in training, (n, K); None: all.
        """
        rows = len(self.study.problem.table)
        mean = self.table.score[:rows].mean(axis=0)
        target = (self.table.score - mean).astype(np.float32)
        if known is None:
            p = self.kernel @ solve_duals(self.kernel, target, [alpha])[0] + mean
        else:
            p = np.empty_like(self.table.score)
            for i, column in enumerate(known.T):
                kernel = self.kernel[np.ix_(column, column)]
                p[:, i] = (self.kernel[:, column] @ solve_duals(kernel, target[column, i : i + 1], [alpha])[0])[:, 0]
            p += mean
        p = np.clip(p.astype(np.float64), 0.0, 1.0)
        return p[:rows], p[rows:]

    def known_pairs(self, seed: int) -> NDArray[np.bool_]:
        """A split by outcome rows: all pairs of the fit rows, and each pair of a test row by chance, (n, K)."""
        known = np.random.default_rng([seed, 2]).random(self.table.score.shape) < KNOWN_PAIRS
        known[: len(self.study.problem.table)] = True
        return known


def prepare(study: Study) -> Leak:
    """Put the test rows among the fit rows and choose both penalties."""
    fit, hashed = study.problem.table, study.hashed
    table = concatenate(fit, study.test)
    features = hash_features(table.prompts, len(hashed.table), hashed.idf).combined(hashed.block_weight)
    kernel = gram(features, features)
    penalties = [alpha * float(np.square(hashed.block_weight).sum()) for alpha in ALPHAS]
    own = kernel[: len(fit), : len(fit)]
    guesses = out_of_fold(own, fit.score.astype(np.float32), study.problem.fold, penalties)
    errors = [float(((guess - fit.score) ** 2).mean()) for guess in guesses]
    leak = Leak(study, table, kernel, 0.0, penalties[int(np.argmin(errors))])
    rows = np.arange(len(study.test))
    reached = [study.test.score[rows, leak.predictions(alpha)[1].argmax(axis=1)].mean() for alpha in penalties]
    return replace(leak, loud=penalties[int(np.argmax(reached))])


def inputs_of(leak: Leak, variant: str, seed: int) -> Inputs:
    """The inputs of a variant; see the head of this file."""
    study = leak.study
    if variant == HONEST:
        return Inputs(study.problem, study.rows, "")
    if variant == TRUE_SCORES:
        return with_predictions(study, study.problem.table.score, study.test.score)
    if variant == BY_ROWS:
        return with_predictions(study, *leak.predictions(leak.loud, leak.known_pairs(seed)))
    return with_predictions(study, *leak.predictions(leak.loud if variant == TEST_PROMPTS else leak.quiet))


class Reached(NamedTuple):
    """One policy on the test rows.

    accuracy, cost_usd: at its most accurate setting on the fit rows, and at q = .5 and .9 (tau' = tau), (3,). gap:
    share of the way from the best fixed candidate to the oracle at the most accurate setting. alarm: whether that
    setting or one of the 17 targets is beyond the leak limit. curve: accuracy and cost of every setting, (2, P).
    """

    accuracy: FloatArray
    cost_usd: FloatArray
    gap: float
    alarm: bool
    curve: FloatArray


def run_variant(leak: Leak, variant: str, seed: int, config: PolicyConfig) -> Reached:
    """Train a policy on a variant's inputs and follow it on the test rows."""
    study, test = leak.study, leak.study.test
    inputs = inputs_of(leak, variant, seed)
    trainer = build_trainer(inputs.problem, config, seed)
    train_to(trainer, config.steps, inputs.prefix + run_name(config, seed), study.store, lambda _: None)
    positions = positions_of(trainer)

    def figures(table: OutcomeTable, rows: Rows, taus: torch.Tensor) -> tuple[FloatArray, FloatArray]:
        curve = curve_of(table, follow(trainer.served, rows, taus, trainer.kappa)[0].numpy())
        return curve.score.mean(axis=1, dtype=np.float64), curve.cost_usd.mean(axis=1, dtype=np.float64)

    at_fit = figures(inputs.problem.table, inputs.problem.rows(), positions)[0]
    top = int(np.flatnonzero(at_fit == at_fit.max())[-1])
    accuracy, cost = figures(test, inputs.rows, positions)
    at_taus = figures(test, inputs.rows, torch.as_tensor(study.taus, dtype=torch.float32))
    shown = [len(study.taus) // 2, -1]
    best, oracle = float(test.score.mean(axis=0).max()), float(test.score.max(axis=1).mean())
    return Reached(
        np.append(accuracy[top], at_taus[0][shown]), np.append(cost[top], at_taus[1][shown]),
        (float(accuracy[top]) - best) / max(oracle - best, 1e-12),
        bool(max(accuracy[top], at_taus[0].max()) > leak_limit(test)), np.stack([accuracy, cost]),
    )  # fmt: skip


Found = Mapping[str, Mapping[str, Sequence[Reached]]]
"""Data set -> variant -> one entry for each seed."""


def leak(studies: Sequence[Study], seeds: int, progress: Progress, config: PolicyConfig = INDEXED) -> Result:
    """A deliberately leaky run beside the honest one: what leaks do to accuracy and cost, and which the alarm sees."""
    found: dict[str, dict[str, list[Reached]]] = {}
    for study in studies:
        prepared = prepare(study)
        found[study.name] = {variant: [] for variant in VARIANTS}
        for variant in VARIANTS:
            for seed in range(seeds):
                found[study.name][variant].append(run_variant(prepared, variant, seed, config))
                progress()
    rows: list[tuple[str, ...]] = []
    figures: dict[str, Any] = {}
    for study in studies:
        bounds = _bounds(study)
        figures[study.name] = {
            "leak_limit": leak_limit(study.test),
            "q": [None, 0.5, 0.9],
            **{name: {"accuracy": bound[0], "cost_usd": bound[1]} for name, bound in bounds.items()},
        }
        for name, (accuracy, cost) in bounds.items():
            rows.append(
                (study.name, name, *_pairs([[value] for value in accuracy], [[value] for value in cost]), "-", "-")
            )
        for variant in VARIANTS:
            mine = found[study.name][variant]
            raised = sum(one.alarm for one in mine)
            columns = ([[float(value[i]) for value in values] for i in range(3)] for values in _columns(mine))
            rows.append(
                (study.name, variant, *_pairs(*columns), show([one.gap for one in mine], 2), f"{raised} of {seeds}")
            )
            figures[study.name][variant] = [
                {
                    "accuracy": one.accuracy.tolist(),
                    "cost_usd": one.cost_usd.tolist(),
                    "gap": one.gap,
                    "alarm": one.alarm,
                }
                for one in mine
            ]
    hashes = {study.name: study.problem.table.sha256 for study in studies}

    def draw(figure: Any) -> None:
        _draw(figure, studies, found)

    columns_shown = (
        "set", "run", "most accurate", "USD per 1,000", "q = .5", "USD per 1,000", "q = .9", "USD per 1,000",
        "oracle gap closed", "leak alarm",
    )  # fmt: skip
    title = "A DELIBERATELY LEAKY RUN: figures that no honest router reaches, and how they arise"
    size = (4.6 * max(len(studies), 2), 4.8)
    return Result("leak", title, columns_shown, rows, figures, _notes(studies, found), draw, hashes, seeds, size)


def _columns(reached: Sequence[Reached]) -> tuple[list[FloatArray], list[FloatArray]]:
    return [one.accuracy for one in reached], [one.cost_usd for one in reached]


def _pairs(accuracy: Sequence[Sequence[float]], cost_usd: Sequence[Sequence[float]]) -> tuple[str, ...]:
    """Cells of accuracy and cost by turns."""
    return tuple(
        cell
        for right, cost in zip(accuracy, cost_usd, strict=True)
        for cell in (show(right), show([1000.0 * value for value in cost]))
    )


def _bounds(study: Study) -> dict[str, tuple[list[float], list[float]]]:
    """Fixed candidates and oracle: the most that they reach, and their least costs at q = .5 and .9."""
    test, taus = study.test, [float(study.taus[len(study.taus) // 2]), float(study.taus[-1])]
    mean = test.score.mean(axis=0)
    best, most = float(mean.max()), float(test.score.max(axis=1).mean())
    return {
        "best fixed, hull of fixed": (
            [best, *taus],
            [float(test.cost_usd.mean(axis=0)[mean.argmax()]), *(hull_cost(test, tau) for tau in taus)],
        ),
        "oracle": ([most, *taus], [oracle_cost(test, tau) for tau in (most, *taus)]),
    }


def _notes(studies: Sequence[Study], found: Found) -> tuple[str, ...]:
    def gap(variant: str) -> float:
        return float(np.mean([one.gap for by_variant in found.values() for one in by_variant[variant]]))

    def raised(variant: str) -> str:
        alarms = [one.alarm for by_variant in found.values() for one in by_variant[variant]]
        return f"{sum(alarms)} of {len(alarms)}"

    limits = ", ".join(f"{study.name} {leak_limit(study.test):.3f}" for study in studies)
    leaky = [one.alarm for by_variant in found.values() for variant in VARIANTS[1:] for one in by_variant[variant]]
    spent = [
        [
            *(np.mean([one.cost_usd[1] for one in found[study.name][variant]]) for variant in VARIANTS),
            _bounds(study)["oracle"][1][1],
        ]
        for study in studies
    ]
    times = np.mean([np.divide(costs[1:], costs[0]) for costs in spent], axis=0)
    ratio, bound = float(times[:-1].mean()), float(times[-1])
    return (
        "Every run marked LEAKY lets labels of the test rows reach the score, on purpose. Its figures are no results; "
        "they show what such figures look like. All runs train one policy in one way; only p differs: out of fold "
        "(honest), the true scores themselves, or a ridge regression on the same features that was fitted with test "
        f"rows (their pairs of prompt and candidate: {KNOWN_PAIRS:.0%} in the split by outcome rows, else all).",
        "most accurate: the setting that is most accurate on the fit rows. q = .5 and .9: the policy at tau' = tau. In "
        "the first two rows: best fixed candidate and the hull of fixed candidates; the oracle and its linear "
        "programme. oracle gap closed: of the way from the best fixed candidate (0) to the oracle (1). The alarm rises "
        f"beyond .5 of it, here above {limits}.",
        f"Oracle gap closed, mean: honest {gap(HONEST):.2f}; true scores in Eq. 2 {gap(TRUE_SCORES):.2f}; split by "
        f"outcome rows {gap(BY_ROWS):.2f}; test prompts in training {gap(TEST_PROMPTS):.2f}, and {gap(QUIET):.2f} with "
        f"the penalty of the honest fit. Alarms: {raised(HONEST)}, {raised(TRUE_SCORES)}, {raised(BY_ROWS)}, "
        f"{raised(TEST_PROMPTS)}, {raised(QUIET)} runs.",
        "The paper reports .901 on the full RouterBench, where the best fixed model has .78, the oracle .91 and honest "
        "routers of third parties peak near .785: .93 of the gap against .04. Tables here are other rows (of "
        "RouterBench a tenth), so shares of the gap compare, accuracies do not. This shows how such a figure can "
        "arise, not how that one did.",
        f"A leak shows in cost too: at q = .5 leaky runs spend {ratio:.2f} times what the honest one does, on average, "
        f"the oracle's linear programme {bound:.2f} times.",
        f"The alarm looks at accuracy alone and sees loud leaks: {len(leaky) - sum(leaky)} of {len(leaky)} leaky runs "
        "stayed below it. What protects is a split by prompt; the alarm is the second line.",
    )


def _draw(figure: Any, studies: Sequence[Study], found: Found) -> None:
    """Accuracy against cost of every run's settings, first seed, one panel a data set."""
    axes = figure.subplots(1, len(studies), squeeze=False)
    for axis, study in zip(axes.flat, studies, strict=True):
        test = study.test
        for number, variant in enumerate(VARIANTS):
            accuracy, cost = found[study.name][variant][0].curve
            style = (
                {"lw": 2.0, "color": "black"} if variant == HONEST else {"lw": 1.1, "color": f"C{number}", "ls": "--"}
            )
            axis.plot(1000.0 * cost, accuracy, label=variant, **style)
        axis.scatter(
            1000.0 * test.cost_usd.mean(axis=0), test.score.mean(axis=0), s=14, c="tab:gray", label="candidates"
        )
        axis.axhline(float(test.score.max(axis=1).mean()), color="tab:green", lw=0.8, label="oracle")
        axis.axhline(leak_limit(test), color="tab:red", lw=0.8, ls=":", label="leak alarm")
        axis.set(title=f"{study.name}: DELIBERATELY LEAKY (dashed)", xlabel="USD per 1,000 queries", xscale="log")
        axis.grid(alpha=0.3)
    axes[0, 0].set(ylabel="accuracy on test")
    axes[0, 0].legend(fontsize=6)
