"""The dual by itself: its PID form, the alarm, and both experiments from a study to files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from proteus_fast.experiments import duals
from proteus_fast.experiments.registry import experiment
from proteus_fast.experiments.study import Study
from proteus_fast.training.fit_policy import start_of
from proteus_fast.training.ppo import Dual, PolicyConfig
from proteus_fast.training.start import Start
from tests.experiments import studies

SMALL = PolicyConfig(hidden=8, epochs=1, sessions=16, batch=8, minibatch=128)
START = Start(torch.tensor([0.5, 0.6, 0.7]), torch.tensor([0.2, 0.5, 0.8]), torch.tensor([1.0, 0.5, 0.1]), 4.0)
SEEN = torch.ones(3, dtype=torch.bool)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return studies.prepare(tmp_path_factory.mktemp("data"), 1500, seed=1, table_rows=1 << 11)


def pid(violations: list[float], cap: float = 1000.0) -> list[float]:
    dual = duals.PidDual(replace(SMALL, dual="scalar", smallest_gain=1.0 / cap), START, 1.0)
    for violation in violations:
        dual.update(torch.full((3,), violation), SEEN)
    np.testing.assert_allclose(dual.violation, violations, rtol=1e-6)
    return dual.moved


def test_pid_follows_its_formula() -> None:
    violations = [0.1, 0.3, 0.2, -0.1, 0.0, -0.5, -2.0, 0.1]
    expected, integral, before = [], 1.0, 0.1
    for v in violations:
        integral = max(integral + 0.4 * v, 0.0)
        expected.append(max(integral + 4.0 * v + 4.0 * max(v - before, 0.0), 0.0))
        before = v
    assert 0.0 in expected
    np.testing.assert_allclose(pid(violations), expected, atol=1e-5)


def test_pid_integrates_decays_and_stops_at_its_cap() -> None:
    steady = pid([0.1] * 20)
    np.testing.assert_allclose(np.diff(steady), 0.04, atol=1e-5)
    # without a violation the integral alone is left, and stays
    np.testing.assert_allclose(pid([0.1] * 5 + [0.0] * 3)[5:], 1.2, atol=1e-5)
    over_met = pid([-0.1] * 40)
    assert (np.diff(over_met) <= 0.0).all()
    assert over_met[-1] == 0.0
    # what was over-met for long is not held against a later violation: the integral stops at 0 too
    np.testing.assert_allclose(pid([-0.1] * 100 + [0.1, 0.1])[-1], 0.08 + 0.4, atol=1e-5)
    assert pid([1.0] * 20, cap=5.0)[-1] == pytest.approx(5.0)


def test_a_session_has_one_lambda() -> None:
    config = replace(SMALL, dual="scalar", scalar_step=0.5)
    dual = duals.SessionDual(config, START, 1.0)
    tau = torch.tensor([0.5, 0.7])
    np.testing.assert_allclose(dual.shares(tau).sum(dim=1), 1.0)
    dual.update(dual.shares(tau).T @ torch.tensor([0.1, 0.3]) / dual.shares(tau).sum(dim=0), SEEN)
    np.testing.assert_allclose(dual.violation, [0.2], rtol=1e-6)
    np.testing.assert_allclose(dual.value, 1.1, rtol=1e-6)
    assert dual.moved == [pytest.approx(1.1)]


def test_settled() -> None:
    dual = duals.SessionDual(SMALL, START, 1.0)
    # windows of five dual steps
    dual.violation = [0.1] * 5 + [-0.1] * 5 + [0.005] * 10
    dual.moved = [1.0] * 14 + [2.0, 4.0] * 3
    found = duals.settled(dual)
    # the last window with a -.1 ends at step 14; the first with three of them, none too short any more, at step 8
    assert (found.within, found.kept) == (75.0, 40.0)
    assert found.final == pytest.approx(0.005)
    assert (found.dual, found.oscillation, found.changes) == (pytest.approx(3.0), pytest.approx(1.0 / 3.0), 2)
    dual.violation[-5:] = [-0.1] * 5
    never = duals.settled(dual)
    assert np.isnan(never.within)
    assert never.kept == 40.0
    dual.moved = [0.0] * 20
    assert np.isnan(duals.settled(dual).oscillation)


def test_response_is_the_plug_in_rule(study: Study) -> None:
    problem = study.problem
    response = duals.response_of(problem)
    assert (np.diff(response.log_dual) > 0).all()
    price, rows = problem.price_usd / problem.unit_usd, np.arange(len(problem.p))
    weight = np.exp(-response.log_dual[200])
    choice = np.argmax(np.clip(problem.p, 0.0, 1.0) - weight * price, axis=1)
    assert response.at(np.array([1.0 / weight]))[0] == pytest.approx(problem.table.score[rows, choice].mean())
    # the knots of a training end at what the rule reaches
    assert float(start_of(problem, SMALL).tau[-1]) == pytest.approx(response.reach, abs=1e-6)


def test_raised_start(study: Study) -> None:
    start = start_of(study.problem, SMALL)
    raised = duals.raised_start(start, 0.04)
    assert float(raised.tau[-1]) == pytest.approx(float(start.tau[-1]) + 0.04, abs=1e-6)
    np.testing.assert_allclose(np.diff(raised.tau), float(raised.tau[1] - raised.tau[0]), rtol=1e-3)
    above = raised.tau > start.tau[-1]
    np.testing.assert_allclose(raised.weight[above], float(start.weight[-1]), rtol=1e-5)
    for name in ("mu", "weight"):
        np.testing.assert_allclose(getattr(duals.raised_start(start, 0.0), name), getattr(start, name), rtol=1e-4)


def test_the_alarm_rises_where_it_should(study: Study) -> None:
    problem, config = study.problem, PolicyConfig()
    response, spread = duals.response_of(problem), duals.largest_difference(problem)
    start = duals.raised_start(start_of(problem, config), 0.1)
    first = duals.simulate(response, Dual(config, start, spread), config, runs=20, batches=400, seed=0)
    assert first.shape == (20, config.knots)
    assert np.isfinite(first[:, -1]).all()
    # with a shortfall of .1 a CUSUM with slack .005 is beyond .25 after three dual steps at the earliest
    assert first[:, -1].min() >= 15
    met = start.tau.double().numpy() <= response.reach - 0.02
    assert met.sum() > 3
    assert np.isinf(first[:, met]).all()
    again = duals.simulate(response, Dual(config, start, spread), config, runs=20, batches=400, seed=0)
    np.testing.assert_array_equal(first, again)


def test_the_alarm_rises_in_training(study: Study) -> None:
    # a cap that is reached at once leaves the CUSUM to decide
    config = replace(SMALL, steps=40, batch=32, smallest_gain=0.1)
    start = duals.raised_start(start_of(study.problem, config), 0.2)
    first = duals.first_alarms(study.problem, config, start, 0)
    assert np.isfinite(first[-1])
    assert np.isinf(first[:3]).all()


def test_convergence(study: Study, tmp_path: Path) -> None:
    done: list[None] = []
    result = duals.convergence([study], 1, lambda: done.append(None), batches=10, base=SMALL)
    assert experiment("convergence") is duals.convergence
    assert len(done) == len(result.rows) == len(duals.SESSION_TARGETS) * len(duals.FORMS)
    assert all(len(row) == len(result.columns) for row in result.rows)
    result.write(tmp_path)
    assert (tmp_path / f"{result.stem}.png").read_bytes().startswith(b"\x89PNG")
    assert "sampled decisions on training rows" in (tmp_path / f"{result.stem}.md").read_text()
    figures = json.loads((tmp_path / f"{result.stem}.json").read_text())["synthetic"]
    one = figures["sessions"][0]
    assert one["tau"] == pytest.approx(study.taus[4])
    assert len(one["seeds"]) == 1
    # one seed gives one session
    form = duals.FORMS[1]._replace(config=replace(duals.FORMS[1].config, steps=10, hidden=8, batch=8))
    a, b, c = (duals.run_session(study.problem, form, one["tau"], seed) for seed in (0, 0, 1))
    assert (a.violation, a.moved) == (b.violation, b.moved)
    assert a.violation != c.violation
    assert len(a.moved) == 2
    # lambda starts at 1 and moves by .4 of the violation
    assert a.moved[0] == pytest.approx(1.0 + 0.4 * a.violation[0], abs=1e-6)


def test_a_session_of_the_default_starts_from_the_table(study: Study) -> None:
    start = start_of(study.problem, PolicyConfig())
    knot = 9
    form = duals.FORMS[-1]._replace(config=replace(duals.FORMS[-1].config, steps=5, hidden=8, batch=8))
    dual = duals.run_session(study.problem, form, float(start.tau[knot]), 0)
    expected = float(1.0 / start.weight[knot]) * np.exp(2.0 * dual.violation[0])
    assert dual.moved[0] == pytest.approx(expected, rel=1e-3)


def test_alarm(study: Study, tmp_path: Path) -> None:
    done: list[None] = []
    result = duals.alarm([study], 2, lambda: done.append(None), batches=10, base=SMALL, runs=10, horizon=200)
    assert experiment("alarm") is duals.alarm
    assert len(done) == 2 * len(duals.EXCESS) * len(duals.TRAINED)
    assert len(result.rows) == len(duals.EXCESS) * len(duals.SETTINGS)
    assert all(len(row) == len(result.columns) for row in result.rows)
    result.write(tmp_path)
    assert (tmp_path / f"{result.stem}.png").read_bytes().startswith(b"\x89PNG")
    assert "false alarms" in (tmp_path / f"{result.stem}.md").read_text()
    figures = json.loads((tmp_path / f"{result.stem}.json").read_text())["synthetic"]
    assert set(figures["settings"]) == set(duals.SETTINGS)
    assert figures["settings"]["default"]["knots"][-1]["simulated"]["runs"] == 10


def test_watched() -> None:
    first = np.full((40, 3), np.inf)
    first[:, 2] = np.arange(5.0, 205.0, 5.0)
    first[0, 0] = 10.0
    first[1, 0] = 500.0
    found = duals.watched(first, START, 0.65, 400)
    # the knot at .7 lies above the reach, that at .5 alone raised an alarm in time
    assert found.wrong == 1
    assert (found.late(0.5), found.late(1.0)) == (105.0, 200.0)
    # 1 of 40: the exact one-sided limit
    assert found.limit == pytest.approx(0.1133, abs=1e-3)
    assert duals.watched(np.full((4, 3), np.inf), START, 0.65, 400).figures()["median"] is None
