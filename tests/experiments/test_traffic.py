"""Traffic: targets stay feasible, shocks move queries the right way, and only labels notice a silent drop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from proteus_fast.certificate import Mode
from proteus_fast.experiments import traffic
from proteus_fast.experiments.study import Result, Study
from proteus_fast.training.ppo import PolicyConfig
from tests.experiments import studies

CONFIG = PolicyConfig(hidden=16, steps=4, sessions=8, batch=16, minibatch=64)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return studies.prepare(tmp_path_factory.mktemp("data"), 2000, seed=9, table_rows=1 << 11)


@pytest.fixture(scope="module")
def deployment(study: Study) -> traffic.Deployment:
    return traffic.deploy(study, 0, CONFIG)


def check_files(result: Result, folder: Path) -> dict[str, object]:
    result.write(folder)
    assert (folder / f"{result.stem}.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / f"{result.stem}.md").read_text()
    assert all(note in text for note in result.notes)
    assert all(len(row) == len(result.columns) for row in result.rows)
    facts: dict[str, object] = json.loads((folder / f"{result.stem}.json").read_text())
    return facts


@pytest.mark.parametrize("queries", [1, 7, 200, 4001])
@pytest.mark.parametrize("pattern", get_args(traffic.Pattern))
def test_patterns_stay_in_their_range(pattern: traffic.Pattern, queries: int) -> None:
    tau = traffic.targets(pattern, queries, 0.6, 0.8, seed=3)
    assert tau.shape == (queries,)
    assert tau.min() >= 0.6
    assert tau.max() <= 0.8
    assert np.array_equal(tau, traffic.targets(pattern, queries, 0.6, 0.8, seed=3))
    if queries == 4001:
        # a pattern that does not use the range would show nothing
        assert tau.max() - tau.min() > 0.19


def test_a_stream_is_scored_by_windows(study: Study) -> None:
    table = replace(study.test, score=np.ones_like(study.test.score))
    rows = np.arange(10) % len(table)
    choice = np.zeros(10, np.int64)
    table.score[rows[:5], 0] = [1.0, 1.0, 0.0, 0.0, 0.0]
    stream = traffic.score_stream(table, rows, choice, np.full(10, 0.5), 0, 5)
    # .4 and 1 against .5: one window of two, and within 1.64 sqrt(.25 / 5) both
    assert stream.met == 0.5
    assert stream.met_within_noise == 1.0
    assert stream.excess == pytest.approx(0.2)
    assert stream.cost_ratio == pytest.approx(1.0)
    strict = traffic.score_stream(table, rows, choice, np.full(10, 0.9), 0, 5)
    assert strict.met_within_noise == 0.5


def test_dynamic(study: Study, tmp_path: Path) -> None:
    done: list[None] = []
    result = traffic.dynamic([study], 2, lambda: done.append(None), CONFIG, queries=800)
    assert len(done) == 2
    facts = check_files(result, tmp_path)
    assert len(result.rows) == 16
    assert facts["window"] == 200
    for pattern in get_args(traffic.Pattern):
        by_policy = result.figures["synthetic"][pattern]
        assert all(len(values) == 2 for served in by_policy.values() for values in served.values())
        calibrated, certified = (by_policy[f"policy, {name}"] for name in ("calibrated", "certified"))
        # the margin is paid for, and buys accuracy; both go below the best fixed candidate's cost
        assert np.all(np.array(calibrated["cost_ratio"]) < np.array(certified["cost_ratio"]))
        assert np.mean(calibrated["excess"]) < np.mean(certified["excess"])
        assert np.all(np.array(certified["cost_ratio"]) < 1.0)


def test_the_range_of_a_stream_is_certified(deployment: traffic.Deployment) -> None:
    low, high = traffic.feasible_range(deployment)
    for mode in get_args(Mode):
        router = deployment.router(mode)
        assert router.mode == mode
        for tau in (low, high):
            assert router.feasibility(tau).status.name == "FEASIBLE"
    nothing = replace(deployment, study=replace(deployment.study, taus=np.array([0.99, 0.995])))
    with pytest.raises(ValueError, match="expected certified targets above"):
        traffic.feasible_range(nothing)


def test_shocks(study: Study, tmp_path: Path) -> None:
    result = traffic.shocks([study], 1, lambda: None, CONFIG)
    check_files(result, tmp_path)
    figures = result.figures["synthetic"]
    assert len(result.rows) == 12
    tau = figures["tau"]
    for mode in get_args(Mode):
        events = {event: found[0] for event, found in figures[mode].items()}
        before = events["before"]
        assert before["status"] == "FEASIBLE"
        assert before["moved"] == 0.0
        assert before["share"] > 0.2
        # cheaper attracts queries, dearer sends them away, and an outage leaves none
        assert events["price x 0.1"]["share"] > before["share"]
        assert events["price x 10"]["share"] < before["share"]
        assert events["outage"]["share"] == 0.0
        assert events["outage"]["moved"] >= before["share"]
        for event in ("price x 0.1", "price x 10", "outage"):
            assert events[event]["status"] == "UNCERTIFIED"
        assert events["price x 10"]["cost_usd"] < events["price x 10"]["unheeded_cost_usd"]
        assert events["outage"]["accuracy"] > events["outage"]["unheeded_accuracy"] + 0.1
        # nothing tells of the silent drop but accuracy itself
        silent, renewed = events["quality drop, silent"], events["quality drop, re-certified"]
        assert silent["status"] == "FEASIBLE"
        assert silent["moved"] == 0.0
        assert silent["tau_max"] == before["tau_max"]
        assert silent["accuracy"] < before["accuracy"] - 0.3 * before["share"] * before["accuracy"] * 0.5
        assert silent["accuracy"] < tau
        assert renewed["accuracy"] > silent["accuracy"]
        assert renewed["cost_usd"] > silent["cost_usd"]
        assert renewed["tau_max"] <= before["tau_max"]


def test_a_drop_takes_right_answers_of_one_candidate(study: Study) -> None:
    worse = traffic.worsened(study.test, 1, seed=0)
    others = [0, 2, 3]
    assert np.array_equal(worse.score[:, others], study.test.score[:, others])
    assert np.all(worse.score[:, 1] <= study.test.score[:, 1])
    kept = worse.score[:, 1].sum() / study.test.score[:, 1].sum()
    assert kept == pytest.approx(1.0 - traffic.DROP, abs=0.08)
