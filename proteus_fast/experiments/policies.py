"""Policies beside each other: what the paper shows first, what it costs, and what each part is worth.

- ``correlation``: does mu follow tau, and accuracy with it? The indexed dual beside the paper's scalar one.
- ``heads``: cost at equal accuracy of both heads, of direct descent, of the plug-in rule, beside hull and oracle.
- ``ablations``, ``cost-range``, ``extremes``: the policy without one of its parts, on other costs, on other targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from proteus_fast.evaluation.metrics import fixed_curve, oracle_cost
from proteus_fast.evaluation.outcomes import OutcomeTable
from proteus_fast.experiments.study import (
    Measured,
    Progress,
    Result,
    Study,
    interval,
    measure,
    ratio_to,
    run_all,
    show,
    study_of,
)
from proteus_fast.training.calibrate import cost_unit_and_scale
from proteus_fast.training.fit_policy import build_trainer, fit_policy, run_name, train_to
from proteus_fast.training.ppo import PolicyConfig, Trainer, draw_batch, rewards_of
from proteus_kernels.reference import scores_ref

_FIGURES = ("tau_mu", "tau_mu_spearman", "tau_accuracy", "mu_range", "cost_ratio", "hull_ratio")

INDEXED = PolicyConfig()
SCALAR = PolicyConfig(head="free", dual="scalar", label_share=0.0, baseline="critic", temperature=(0.1, 0.01), stay=0.0)
"""The paper's: free head, one lambda, predicted accuracy in the reward, a critic. kappa stays ours: with the paper's 1
the cheap targets are out of reach, whatever the policy does."""
FREE = PolicyConfig(head="free", stay=0.0)


def train_seeds(
    study: Study, config: PolicyConfig, seeds: int, progress: Progress, *, select: bool = True, first: int = 0
) -> list[Trainer]:
    """One policy for each seed; the number of steps is chosen out of fold once, with the first seed.

    Args:
        select: False: ``config.steps`` for all. first: number of the first seed.
    """
    steps, done = config.steps, []
    if select:
        fitted = fit_policy(study.problem, config, seed=first, store=study.store)
        steps, done = fitted.steps, [fitted.trainer]
        progress()

    def one(seed: int) -> Trainer:
        trainer = build_trainer(study.problem, config, seed)
        train_to(trainer, steps, run_name(config, seed), study.store, lambda _: None)
        return trainer

    return done + run_all(one, range(first + len(done), first + seeds), progress)


def descend(study: Study, config: PolicyConfig, seed: int) -> Trainer:
    """Direct descent instead of PPO: the gradient of the reward through softmax(s / T), mu and all.

    The optimiser, batches and temperatures are PPO's; the dual stays at its start, rewards are not scaled by session,
    and nothing holds the policy to the dual table.
    """
    trainer = build_trainer(study.problem, config, seed)
    name = f"{run_name(config, seed)}-descent"
    stored = study.store.load(name)
    if stored is not None:
        trainer.restore(stored)
        return trainer
    network = trainer.network
    for step in range(config.steps):
        batch = draw_batch(trainer.rows, config, trainer.dual.knots, seed, step)
        rewards = rewards_of(batch.rows, batch.tau, trainer.dual.at(batch.tau), config)
        first, last = config.temperature
        temperature = first * (last / first) ** (step / max(config.steps - 1, 1))
        for _ in range(config.epochs):
            for index in torch.arange(len(batch.tau)).split(config.minibatch):  # type: ignore[no-untyped-call]
                rows = batch.rows.take(index)
                mu = network(rows.z, batch.tau[index]).mu
                scores = scores_ref(rows.p, mu, network.prior, rows.price, trainer.kappa, network.gamma)
                loss = -(torch.softmax(scores / temperature, dim=1) * rewards[index]).sum(dim=1).mean()
                trainer.optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(trainer.parameters, config.gradient_clip)
                trainer.optimiser.step()
    study.store.save(name, **trainer.state())
    return trainer


def _mean(measured: Sequence[Measured], name: str) -> float:
    return interval([getattr(one, name) for one in measured])[0]


def _figures(measured: Sequence[Measured]) -> dict[str, Any]:
    """Means over seeds, with 95 % intervals where there is more than one."""
    figures: dict[str, Any] = {name: _mean(measured, name) for name in _FIGURES}
    if len(measured) > 1:
        figures["interval"] = {name: interval([getattr(one, name) for one in measured])[1:] for name in _FIGURES}
    return figures


def _cells(measured: Sequence[Measured]) -> tuple[str, ...]:
    return tuple(show([getattr(one, name) for one in measured]) for name in _FIGURES)


_ONE_CHOICE = "The number of steps is chosen out of fold once, with the first seed: intervals leave that choice out."
_NOTE = (
    "17 targets, q = .1 ... .9 of the range between cheapest and best candidate on the fit rows; mu, accuracy and cost "
    "are means over the test rows at tau' = tau, without calibration. cost / hull: the policy's cost over that "
    "of the plug-in path's hull (in hindsight on the test rows) at the accuracy that the policy has, geometric mean. "
    "hull / hull: both as hulls in hindsight, at q = .3 ... .9."
)


Found = dict[str, dict[str, list[Measured]]]
"""What was measured: variant -> data set -> one entry for each seed."""


def _draw_maps(figure: Any, studies: Sequence[Study], found: Found) -> None:
    """tau against mu and against accuracy, a column for each data set; bands are the range over seeds."""
    axes = figure.subplots(2, len(studies), squeeze=False)
    for column, study in enumerate(studies):
        for number, (label, by_study) in enumerate(found.items()):
            for row, name in enumerate(("mu", "accuracy")):
                values = np.array([getattr(one, name) for one in by_study[study.name]])
                color = f"C{number % 10}"
                axes[row, column].plot(study.taus, values.mean(axis=0), color=color, label=label, lw=1.2)
                axes[row, column].fill_between(
                    study.taus, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15
                )
        axes[1, column].plot(study.taus, study.taus, color="black", lw=0.6, ls="--")
        axes[0, column].set(title=study.name, ylabel="mean mu", ylim=(0, 1))
        axes[1, column].set(xlabel="tau", ylabel="accuracy on test")
    axes[0, 0].legend(fontsize=6)


def _result(
    name: str, title: str, studies: Sequence[Study], found: Found, notes: tuple[str, ...], seeds: int,
    bounds: Mapping[str, Mapping[str, float]] | None = None,
) -> Result:  # fmt: skip
    """A table of variants by data set, and their means over data sets.

    Args:
        bounds: data set -> label -> cost over the plug-in hull, for what is no policy.
    """
    rows: list[tuple[str, ...]] = []
    figures: dict[str, Any] = {}
    for study in studies:
        rows += [(study.name, label, *_cells(by_study[study.name])) for label, by_study in found.items()]
        figures[study.name] = {label: _figures(by_study[study.name]) for label, by_study in found.items()}
        for label, value in (bounds or {}).get(study.name, {}).items():
            rows.append((study.name, label, "-", "-", "-", "-", f"{value:.3f}", "-"))
            figures[study.name][label] = value
    if len(studies) > 1:
        means = {
            label: {key: float(np.mean([figures[study.name][label][key] for study in studies])) for key in _FIGURES}
            for label in found
        }
        rows += [("mean", label, *(f"{value:.3f}" for value in values.values())) for label, values in means.items()]
        figures["mean"] = means
    columns = ("set", "policy", "tau-mu r", "Spearman", "tau-accuracy r", "range of mu", "cost / hull", "hull / hull")

    def draw(figure: Any) -> None:
        _draw_maps(figure, studies, found)

    hashes = {study.name: study.problem.table.sha256 for study in studies}
    size = (3.2 * max(len(studies), 2), 5.0)
    return Result(name, title, columns, rows, figures, (_NOTE, *notes), draw, hashes, seeds, size)


def correlation(studies: Sequence[Study], seeds: int, progress: Progress) -> Result:
    """The paper's tau-mu correlation on held-out queries (r > .95 there), indexed dual beside the scalar one."""
    found: Found = {"indexed": {}, "scalar": {}}
    for study in studies:
        for label, config, select in (("indexed", INDEXED, True), ("scalar", SCALAR, False)):
            trainers = train_seeds(study, config, seeds, progress, select=select)
            found[label][study.name] = [measure(study, trainer) for trainer in trainers]
    notes = (
        "indexed: lambda(tau) on 16 knots, residual head, steps chosen out of fold. scalar: the paper's single lambda, "
        "free head, predicted accuracy in the reward and a critic, lambda = 1 at inference; tau enters its reward as a "
        "constant, so nothing ties mu to it.",
        _ONE_CHOICE,
    )
    return _result("correlation", "Does the preference follow the target?", studies, found, notes, seeds)


def heads(studies: Sequence[Study], seeds: int, progress: Progress) -> Result:
    """Cost at equal accuracy: both heads by PPO, direct descent, the dual table, the hull, the oracle."""
    found: Found = {"residual, PPO": {}, "free, PPO": {}, "residual, direct descent": {}, "dual table": {}}
    bounds: dict[str, dict[str, float]] = {}
    for study in studies:
        trained = {
            "residual, PPO": train_seeds(study, INDEXED, seeds, progress),
            "free, PPO": train_seeds(study, FREE, seeds, progress, select=False),
            "residual, direct descent": [descend(study, INDEXED, seed) for seed in range(seeds)],
            "dual table": [build_trainer(study.problem, INDEXED, 0)],
        }
        for label, trainers in trained.items():
            found[label][study.name] = [measure(study, trainer) for trainer in trainers]
        accuracy = found["dual table"][study.name][0].accuracy
        hull = fixed_curve(study.test).costs(accuracy, study.test)
        oracle = np.array([oracle_cost(study.test, float(tau)) for tau in accuracy])
        bounds[study.name] = {
            "hull of fixed candidates": ratio_to(study.plug_in, study.test, accuracy, hull),
            "oracle linear programme": ratio_to(study.plug_in, study.test, accuracy, oracle),
        }
    notes = (
        "dual table: where the residual head starts, a policy without its network; its points against the hull of the "
        "same rule show what a smoothed table loses to a hull that is read in hindsight. Bounds are taken at the "
        "accuracies of the dual table. Free head and direct descent train for as many steps as the residual head may "
        f"({INDEXED.steps}), without a choice out of fold; descent has a fixed dual and is not held to the table.",
        _ONE_CHOICE,
    )
    return _result("heads", "What equal accuracy costs", studies, found, notes, seeds, bounds)


def _compare(configs: Mapping[str, PolicyConfig], studies: Sequence[Study], seeds: int, progress: Progress) -> Found:
    """Policies that differ in their configuration only, all for the same number of steps."""
    found: Found = {label: {} for label in configs}
    for study in studies:
        for label, config in configs.items():
            trainers = train_seeds(study, config, seeds, progress, select=False)
            found[label][study.name] = [measure(study, trainer) for trainer in trainers]
    return found


def ablations(studies: Sequence[Study], seeds: int, progress: Progress) -> Result:
    """The policy without one of its parts."""
    configs = {
        "as shipped": INDEXED,
        "no lambda (dual held at its start)": replace(INDEXED, dual_step=0.0),
        "no learned gamma": replace(INDEXED, learn_gamma=False),
        "no prior b": replace(INDEXED, learn_prior=False),
        "critic as baseline": replace(INDEXED, baseline="critic"),
        "no baseline": replace(INDEXED, baseline="none"),
        "labels alone in the reward": replace(INDEXED, label_share=1.0),
        "predictions alone in the reward": replace(INDEXED, label_share=0.0),
        "tau drawn per batch": replace(INDEXED, session_batches=1),
        "not held to the dual table": replace(INDEXED, stay=0.0),
        "scalar dual, residual head": replace(INDEXED, dual="scalar"),
    }
    notes = (f"Every variant trains for {INDEXED.steps} steps; nothing is chosen out of fold here.",)
    found = _compare(configs, studies, seeds, progress)
    return _result("ablations", "What each part is worth", studies, found, notes, seeds)


def extremes(studies: Sequence[Study], seeds: int, progress: Progress) -> Result:
    """Targets in training from the two ends of the range only."""
    configs = {"all targets": INDEXED, "extremes only": replace(INDEXED, taus="extremes")}
    notes = ("extremes only: sessions draw tau from the lowest and the highest tenth of the range.",)
    found = _compare(configs, studies, seeds, progress)
    return _result("extremes", "Trained on extreme targets only", studies, found, notes, seeds)


def with_cost_range(study: Study, factor: float) -> Study:
    """The same study with prices pressed into a range: the dearest candidate costs ``factor`` times the cheapest.

    Prices keep their order and, on the logarithmic scale, their relative distances; a query's cost stays the same
    multiple of its candidate's price.
    """
    price = study.problem.price_usd
    place = np.log(price / price.min()) / max(float(np.log(price.max() / price.min())), 1e-12)
    change = price.min() * factor**place / price

    def changed(table: OutcomeTable) -> OutcomeTable:
        return replace(table, cost_usd=table.cost_usd * change)

    fit = changed(study.problem.table)
    new_price = fit.cost_usd.mean(axis=0)
    unit, kappa = cost_unit_and_scale(study.problem.p, new_price)
    problem = replace(study.problem, table=fit, price_usd=new_price, unit_usd=unit, kappa=kappa)
    division = replace(study.division, fit=fit)
    return study_of(division, changed(study.test), study.hashed, problem)


def cost_range(studies: Sequence[Study], seeds: int, progress: Progress) -> Result:
    """Cost ranges of 2 and 10 with fixed and learned gamma."""
    found: Found = {}
    for study in studies:
        for factor in (2.0, 10.0):
            changed = with_cost_range(study, factor)
            configs = {
                f"{factor:g}x, gamma {word}": replace(INDEXED, learn_gamma=learned)
                for word, learned in (("fixed", False), ("learned", True))
            }
            for label, by_study in _compare(configs, [changed], seeds, progress).items():
                found.setdefault(label, {}).update(by_study)
    notes = (
        "Prices are pressed into the range on the logarithmic scale. gamma starts where mu is closest to linear in "
        "tau, in both; learned: it then follows the annealed soft choice.",
    )
    return _result("cost-range", "Cost ranges of 2 and 10", studies, found, notes, seeds)
