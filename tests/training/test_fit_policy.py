"""Stage 2 as a whole: the step is chosen out of fold, the path can be certified, a stopped run is taken up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from proteus_fast.checkpoint import MAX_MAGNITUDE
from proteus_fast.evaluation.metrics import SELECTION_TARGETS, relative_targets
from proteus_fast.evaluation.outcomes import FOLDS, OutcomeTable, read_division
from proteus_fast.training import fit_policy as fit_policy_module
from proteus_fast.training.fit_policy import Nowhere, PolicyFit, Problem, fit_policy, positions_of, watched_steps
from proteus_fast.training.fit_predictor import fit_predictor
from proteus_fast.training.ppo import PolicyConfig, Trainer
from proteus_fast.training.stages import Stages
from proteus_fast.training.train import TrainConfig
from tests.evaluation import synthetic

SMALL = PolicyConfig(
    hidden=16, sessions=4, batch=32, epochs=1, minibatch=32, session_batches=4, knots=8, learning_rate=0.02, steps=9
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def looks_every_four_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_policy_module, "WATCH_EVERY", 4)
        yield


def dear_by_topic(table: OutcomeTable) -> OutcomeTable:
    """Two topics whose answers are long, whoever writes them."""
    long = np.array([4.0 if task in ("proofs", "history") else 0.5 for task in table.tasks])
    return replace(table, cost_usd=table.cost_usd * long[:, None])


def prepare(table: OutcomeTable, folder: Path) -> Problem:
    data = synthetic.write_splits(folder / "synthetic", table)
    config = TrainConfig(
        data=data, out=folder / "out", table_rows=1 << 11, extra_dim=4, alphas=(1.0, 8.0), variants=("each+0",),
        block_weights=((1.0, 1.0, 1.0, 0.0),), mode="policy",
    )  # fmt: skip
    first = fit_predictor(config, read_division(data), Stages(folder, "", read_only=True), lambda _: None)
    assert first.problem is not None
    return first.problem


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    return prepare(dear_by_topic(synthetic.outcome_table(900, seed=9)), tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def fitted(problem: Problem) -> PolicyFit:
    return fit_policy(problem, SMALL, seed=0)


class Memory:
    """A store in memory; what it gives away it keeps no part of."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, NDArray[Any]]] = {}
        self.saved: list[str] = []

    def load(self, name: str) -> Mapping[str, NDArray[Any]] | None:
        arrays = self.kept.get(name)
        return None if arrays is None else {key: values.copy() for key, values in arrays.items()}

    def save(self, name: str, **arrays: Any) -> Mapping[str, NDArray[Any]]:
        self.saved.append(name)
        self.kept[name] = {key: np.array(values) for key, values in arrays.items()}
        return self.kept[name]


def assert_same(first: PolicyFit, second: PolicyFit) -> None:
    tensors, others = first.trainer.served.tensors(), second.trainer.served.tensors()
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.tobytes() == others[name].tobytes(), name
    assert first.steps == second.steps
    assert first.cost_usd.tobytes() == second.cost_usd.tobytes()
    assert first.path.parameter.tobytes() == second.path.parameter.tobytes()
    assert first.path.expected_cost_usd.tobytes() == second.path.expected_cost_usd.tobytes()
    assert first.trainer.log == second.trainer.log


def test_problem_rows_are_those_of_the_table(problem: Problem) -> None:
    table = problem.table
    n, candidates = table.score.shape
    assert problem.p.shape == (n, candidates)
    assert problem.nested_p.shape == (FOLDS, n, candidates)
    assert problem.z.shape[0] == n
    assert problem.nested_z.shape == (FOLDS, *problem.z.shape)
    for held_out in (None, 2):
        rows = problem.rows(held_out)
        assert all(part.dtype == torch.float32 for part in rows)
        assert ((rows.p >= 0) & (rows.p <= 1)).all()
        torch.testing.assert_close(rows.y, torch.from_numpy(table.score).float())
        torch.testing.assert_close(rows.c.mean(dim=0), rows.price)
        assert rows.price.max() == 1.0
    # held-out rows see the models of the other folds in both
    for k in range(FOLDS):
        own = problem.fold == k
        np.testing.assert_array_equal(problem.nested_p[k][own], problem.p[own])
        np.testing.assert_array_equal(problem.nested_z[k][own], problem.z[own])


def test_the_embedding_shows_which_rows_are_dear(problem: Problem) -> None:
    scale = np.log(problem.table.cost_usd).mean(axis=1)
    column = problem.z[:, len(problem.table.candidates)]
    assert np.corrcoef(column, scale)[0, 1] > 0.6


def test_the_step_that_costs_least_out_of_fold_is_kept(problem: Problem, fitted: PolicyFit) -> None:
    assert fitted.tried.tolist() == watched_steps(SMALL).tolist() == [0, 4, 8, 9]
    assert np.isfinite(fitted.cost_usd).all()
    assert fitted.steps == fitted.tried[fitted.cost_usd.argmin()] == fitted.trainer.step
    assert fitted.chosen_cost_usd == fitted.cost_usd.min()
    # here there is something to learn, and the plug-in rule does not
    assert fitted.steps > 0
    assert fitted.chosen_cost_usd < fitted.dual_cost_usd
    table = problem.table
    taus = relative_targets(table.score.mean(axis=0), problem.price_usd, SELECTION_TARGETS)
    cost = np.exp(np.log(fitted.curve.costs(taus, table)).mean())
    assert cost == pytest.approx(fitted.chosen_cost_usd, rel=1e-12)
    assert fitted.unsatisfiable == []


def test_the_path_can_be_certified(problem: Problem, fitted: PolicyFit) -> None:
    parameter, cost = fitted.path.parameter, fitted.path.expected_cost_usd
    assert parameter.dtype == np.float32
    assert 2 <= len(parameter) == len(cost) <= 64
    assert (np.diff(cost) < 0).all()
    assert (np.diff(parameter) < 0).all()
    assert parameter.min() >= 0.0
    assert parameter.max() <= 1.0
    # recorded costs on out-of-fold rows, between those of the cheapest and of the dearest candidate
    assert problem.price_usd.min() * 0.9 < cost.min()
    assert cost.max() < problem.price_usd.max() * 1.1
    assert set(parameter.tolist()) <= set(positions_of(fitted.trainer).tolist())


def test_without_selection_the_last_step_is_kept(problem: Problem, fitted: PolicyFit) -> None:
    config = replace(SMALL, steps=3)
    last = fit_policy(problem, config, seed=0, select=False)
    assert last.tried.tolist() == [0, 3]
    assert last.steps == last.trainer.step == 3
    assert last.chosen_cost_usd == last.cost_usd[-1]
    assert (np.diff(last.path.expected_cost_usd) < 0).all()
    # both start at the same table
    assert last.cost_usd[0] == fitted.cost_usd[0]


def test_a_stopped_run_is_taken_up(problem: Problem, fitted: PolicyFit) -> None:
    store, looks, stops = Memory(), 0, 0

    def stop(_: Trainer) -> None:
        nonlocal looks
        looks += 1
        if looks > 3:
            raise KeyboardInterrupt

    resumed = None
    while resumed is None:
        looks = 0
        try:
            resumed = fit_policy(problem, SMALL, seed=0, store=store, progress=stop)
        except KeyboardInterrupt:
            stops += 1
            assert stops < 10
    # in the folds, and in the run on all rows
    assert stops >= 3
    assert_same(resumed, fitted)
    # finished, it is only read
    store.saved.clear()
    looks = 0
    again = fit_policy(problem, SMALL, seed=0, store=store, progress=stop)
    assert (looks, store.saved) == (0, [])
    assert_same(again, fitted)


def test_another_seed_or_setting_is_another_run(problem: Problem) -> None:
    store, config = Memory(), replace(SMALL, steps=0)
    runs = []
    for changed, seed in ((config, 0), (config, 1), (replace(config, stay=0.5), 0)):
        store.saved.clear()
        fit_policy(problem, changed, seed=seed, store=store)
        runs.append(set(store.saved))
    assert all(runs)
    assert len(runs[0] | runs[1] | runs[2]) == sum(map(len, runs))


def test_a_store_that_keeps_nothing(problem: Problem) -> None:
    store = Nowhere()
    assert store.load("x") is None
    assert store.save("x", a=1)["a"] == 1
    assert store.load("x") is None
    config = replace(SMALL, steps=1)
    assert_same(fit_policy(problem, config, seed=0, store=store), fit_policy(problem, config, seed=0))


def test_threads_are_given_back(problem: Problem) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fit_policy(problem, replace(SMALL, steps=0), seed=0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "case", ["one candidate", "equal prices", "free", "flat costs", "all right", "all wrong", "one never right"]
)
def test_tables_with_little_to_choose(tmp_path: Path, case: str) -> None:
    table = synthetic.outcome_table(400, seed=11)
    price = table.cost_usd.mean(axis=0)
    if case == "one candidate":
        table = table.with_candidates(table.candidates[:1])
    elif case == "equal prices":
        table = replace(table, cost_usd=np.repeat(table.cost_usd[:, :1], len(price), axis=1))
    elif case == "free":
        table = replace(table, cost_usd=np.zeros_like(table.cost_usd))
    elif case == "flat costs":
        table = replace(table, cost_usd=np.tile(price, (len(table), 1)))
    elif case == "one never right":
        table = replace(table, score=table.score * (np.arange(len(price)) > 0))
    else:
        table = replace(table, score=np.full_like(table.score, case == "all right"))
    problem = prepare(table, tmp_path)
    assert np.isfinite(problem.z).all()
    fitted = fit_policy(problem, replace(SMALL, steps=2), seed=0)
    # what a checkpoint takes: a column that is the same in every row must not blow up its weights
    assert all((np.abs(tensor) < MAX_MAGNITUDE).all() for tensor in fitted.trainer.served.tensors().values())
    assert np.isfinite(fitted.cost_usd).all()
    assert (np.diff(fitted.path.expected_cost_usd) < 0).all()
    assert len(fitted.path.parameter) >= 1
    assert ((fitted.path.parameter >= 0) & (fitted.path.parameter <= 1)).all()


def test_watched_steps_include_both_ends() -> None:
    assert watched_steps(replace(SMALL, steps=0)).tolist() == [0]
    assert watched_steps(replace(SMALL, steps=3)).tolist() == [0, 3]
    assert watched_steps(replace(SMALL, steps=12)).tolist() == [0, 4, 8, 12]
