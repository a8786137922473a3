"""From fit rows to a policy with its path: fold policies choose the number of steps, one policy on all rows is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from proteus_fast.certificate import Path, lay_path
from proteus_fast.evaluation.metrics import SELECTION_TARGETS, Curve, plug_in_curve, relative_targets
from proteus_fast.evaluation.outcomes import FOLDS, OutcomeTable
from proteus_fast.training.distributed import from_first, is_first
from proteus_fast.training.ppo import (
    Dual,
    PolicyConfig,
    Rows,
    Trainer,
    build_network,
    follow,
)
from proteus_fast.training.start import Start, dual_start

FloatArray = NDArray[np.float64]

WATCH_EVERY = 20
"""Batches between two looks at the held-out fold."""
_POSITIONS = 129
_VERTICES = 64


@dataclass(frozen=True)
class Problem:
    """Fit rows as stage 2 sees them; see ``crossfit`` for what nested means.

    Attributes:
        table: the fit rows. fold: (n,). price_usd: mean cost of each candidate, (K,). unit_usd, kappa: of the score.
        z, p: embeddings (n, D) and predicted accuracies (n, K), out of fold. nested_z, nested_p: the same for each
            held-out fold, (FOLDS, n, D) and (FOLDS, n, K).
    """

    table: OutcomeTable
    fold: NDArray[np.int64]
    price_usd: FloatArray
    unit_usd: float
    kappa: float
    z: NDArray[np.float32]
    p: FloatArray
    nested_z: NDArray[np.float32]
    nested_p: FloatArray

    def rows(self, held_out: int | None = None, device: str = "cpu") -> Rows:
        """Rows for training; with a held-out fold all rows, as a policy trained on the other folds may see them."""
        z, p = (self.z, self.p) if held_out is None else (self.nested_z[held_out], self.nested_p[held_out])
        return to_rows(self, z, p, self.table, device)


def to_rows(problem: Problem, z: NDArray[np.float32], p: FloatArray, table: OutcomeTable, device: str = "cpu") -> Rows:
    """Rows of any table in the problem's units."""
    arrays = (
        z,
        np.clip(p, 0.0, 1.0),
        table.score,
        table.cost_usd / problem.unit_usd,
        problem.price_usd / problem.unit_usd,
    )
    return Rows(*(torch.as_tensor(np.asarray(values, np.float32), device=device) for values in arrays))


class Store(Protocol):
    """Where finished and half-finished runs are kept."""

    def load(self, name: str) -> Mapping[str, NDArray[Any]] | None:
        """What was saved under a name; None where nothing was."""

    def save(self, name: str, **arrays: Any) -> Mapping[str, NDArray[Any]]:
        """Keep arrays under a name."""


class Nowhere:
    """A store that keeps nothing."""

    def load(self, name: str) -> None:
        """Nothing was saved."""

    def save(self, name: str, **arrays: Any) -> Mapping[str, NDArray[Any]]:  # noqa: ARG002
        """Keep nothing."""
        return {key: np.asarray(value) for key, value in arrays.items()}


@dataclass(frozen=True)
class PolicyFit:
    """A trained policy.

    Attributes:
        trainer: with the network, the dual and the log. steps: batches, as chosen out of fold. path: its path,
            before certification; out-of-fold accuracy and cost are those of the fold policies at the same place between
            their own knots. tried: steps watched, (S,). cost_usd: out-of-fold selection cost of each, (S,).
            dual_cost_usd: that of the plug-in rule on the same rows. curve: out-of-fold curve at the chosen step.
    """

    trainer: Trainer
    steps: int
    path: Path
    tried: NDArray[np.int64]
    cost_usd: FloatArray
    dual_cost_usd: float
    curve: Curve

    @property
    def unsatisfiable(self) -> list[float]:
        """Targets of knots that the alarm says cannot be met."""
        dual = self.trainer.dual
        return [round(float(tau), 4) for tau in dual.knots[dual.unsatisfiable]]

    @property
    def chosen_cost_usd(self) -> float:
        """Out-of-fold selection cost at the chosen step."""
        return float(self.cost_usd[np.flatnonzero(self.tried == self.steps)[0]])


def positions_of(trainer: Trainer) -> torch.Tensor:
    """Path parameters tau' from one knot's width above the highest knot to one below the lowest, (129,)."""
    knots = trainer.dual.knots
    width = float(knots[1] - knots[0])
    high, low = min(float(knots[-1]) + width, 1.0), max(float(knots[0]) - width, 0.0)
    return torch.linspace(high, low, _POSITIONS, device=knots.device)


def start_of(problem: Problem, config: PolicyConfig, held_out: int | None = None) -> Start:
    """The dual table on the training rows of a run."""
    rows = slice(None) if held_out is None else problem.fold != held_out
    p = problem.p if held_out is None else problem.nested_p[held_out]
    price = problem.price_usd / problem.unit_usd
    return dual_start(np.clip(p[rows], 0.0, 1.0), problem.table.score[rows], price, problem.kappa, config.knots)


def build_trainer(
    problem: Problem, config: PolicyConfig, seed: int, held_out: int | None = None, device: str = "cpu"
) -> Trainer:
    """A run at its start, on all rows or on those outside a fold."""
    rows = problem.rows(held_out, device)
    if held_out is not None:
        rows = rows.take(torch.from_numpy(np.flatnonzero(problem.fold != held_out)).to(device))
    start = start_of(problem, config, held_out)
    start = Start(start.tau.to(device), start.mu.to(device), start.weight.to(device), start.gamma)
    spread = float(problem.price_usd.max() - problem.price_usd.min()) / problem.unit_usd
    dual = Dual(config, start, max(spread, 1e-6))
    return Trainer(build_network(rows, config, start, seed), rows, config, dual, kappa=problem.kappa, seed=seed)


def curve_of(table: OutcomeTable, choice: NDArray[np.int64]) -> Curve:
    """Score and cost of choices (T, n) on the rows of a table."""
    rows = np.arange(len(table))
    return Curve(table.score[rows, choice].astype(np.float32), table.cost_usd[rows, choice].astype(np.float32))


def run_name(config: PolicyConfig, seed: int) -> str:
    """Under which a run on all rows is stored; it depends on everything that shapes it but the rows."""
    return "policy-" + hashlib.sha256(json.dumps([asdict(config), seed], sort_keys=True).encode()).hexdigest()[:12]


def watched_steps(config: PolicyConfig) -> NDArray[np.int64]:
    """Steps at which the held-out fold is looked at: 0, every ``WATCH_EVERY``, the last."""
    return np.unique(np.append(np.arange(0, config.steps + 1, WATCH_EVERY), config.steps))


def fit_policy(
    problem: Problem,
    config: PolicyConfig,
    *,
    seed: int,
    store: Store | None = None,
    progress: Callable[[Trainer], None] = lambda _: None,
    device: str = "cpu",
    select: bool = True,
) -> PolicyFit:
    """Train a policy for as many steps as cost least out of fold, and lay its path.

    Args:
        problem: fit rows. config, seed: of every run. store: keeps finished runs, and the state of unfinished ones
            every ``WATCH_EVERY`` steps. progress: called as often, FOLDS + 1 runs long. device: cpu or cuda.
        select: choose the number of steps out of fold; False: ``config.steps``, the path still out of fold.
    """
    store = store or Nowhere()
    name = run_name(config, seed)
    watched = watched_steps(config)
    threads = torch.get_num_threads()
    # batches of a thousand rows are too small for threads to share
    torch.set_num_threads(1)
    try:
        choice = np.zeros((len(watched), _POSITIONS, len(problem.table)), np.int16)
        for k in range(FOLDS):
            held = np.flatnonzero(problem.fold == k)
            rows = problem.rows(k, device).take(torch.from_numpy(held).to(device))
            fold_trainer = build_trainer(problem, config, seed, k, device)
            choice[:, :, held] = _watched_run(fold_trainer, rows, watched, f"{name}-{k}", store, progress)
        price, table = problem.price_usd, problem.table
        taus = relative_targets(table.score.mean(axis=0), price, SELECTION_TARGETS)
        curves = [curve_of(table, one.astype(np.int64)) for one in choice]
        cost = np.array([float(np.exp(np.log(curve.costs(taus, table)).mean())) for curve in curves])
        best = from_first(int(cost.argmin()) if select else len(watched) - 1)
        trainer = build_trainer(problem, config, seed, None, device)
        train_to(trainer, int(watched[best]), run_name(config, seed), store, progress)
    finally:
        torch.set_num_threads(threads)
    plug_in = plug_in_curve(np.clip(problem.p, 0.0, 1.0), price, table)
    parameter = positions_of(trainer).cpu().numpy()
    accuracy, mean_cost = (
        values.mean(axis=1, dtype=np.float64) for values in (curves[best].score, curves[best].cost_usd)
    )
    path = lay_path(parameter, accuracy, mean_cost, _VERTICES)
    dual_cost = float(np.exp(np.log(plug_in.costs(taus, table)).mean()))
    return PolicyFit(trainer, int(watched[best]), path, watched, cost, dual_cost, curves[best])


def _watched_run(
    trainer: Trainer, held: Rows, watched: NDArray[np.int64], name: str, store: Store,
    progress: Callable[[Trainer], None],
) -> NDArray[np.int16]:  # fmt: skip
    """Train one fold's policy; its choices on the held-out rows at every watched step, (S, T, m)."""
    done = from_first(store.load(name) if is_first() else None)
    if done is not None:
        return np.asarray(done["choice"])
    taus = positions_of(trainer)
    seen: list[NDArray[np.int16]] = []
    half = from_first(store.load(f"{name}-state") if is_first() else None)
    if half is not None:
        seen = list(half["choice"])
        trainer.restore(half)
    for step in watched[len(seen) :]:
        trainer.train(int(step))
        seen.append(follow(trainer.served, held, taus, trainer.kappa)[0].cpu().numpy().astype(np.int16))
        if step < watched[-1]:
            store.save(f"{name}-state", choice=np.stack(seen), **trainer.state())
        progress(trainer)
    store.save(name, choice=np.stack(seen))
    return np.stack(seen)


def train_to(trainer: Trainer, steps: int, name: str, store: Store, progress: Callable[[Trainer], None]) -> None:
    """Train to a number of steps, from where an earlier run was stopped."""
    name = f"{name}-to-{steps}"
    state = from_first(store.load(name) if is_first() else None)
    if state is not None:
        trainer.restore(state)
    while trainer.step < steps:
        trainer.train(min(trainer.step + WATCH_EVERY, steps))
        store.save(name, **trainer.state())
        progress(trainer)
