"""The report: the shape that scripts rely on, figures recomputed by hand, leaks, what happens without baselines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from proteus_fast import Router, evaluate
from proteus_fast.certificate import Status
from proteus_fast.evaluation.metrics import (
    RELATIVE_TARGETS,
    SELECTION_TARGETS,
    hull_cost,
    oracle_cost,
    plug_in_curve,
    relative_targets,
)
from proteus_fast.evaluation.outcomes import Division, OutcomeTable, concatenate, read_division, read_table
from proteus_fast.evaluation.report import LeakError, Report
from proteus_fast.training.calibrate import plug_in_checkpoint
from tests.evaluation import synthetic
from tests.evaluation.conftest import Train

BASELINES = ["hull_usd", "oracle_usd", "best_fixed_usd", "knn_usd", "tfidf_ridge_usd"]


@pytest.fixture(scope="module")
def report(router: Router, test_table: OutcomeTable, division: Division) -> Report:
    return evaluate(router, test_table, division=division)


def test_the_shape_is_the_one_that_scripts_rely_on(report: Report, test_table: OutcomeTable) -> None:
    root = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert list(root) == ["dataset", "split", "n", "rows"]
    assert (root["dataset"], root["split"], root["n"]) == ("synthetic", "test", len(test_table))
    assert len(root["rows"]) == len(RELATIVE_TARGETS)
    for row in root["rows"]:
        assert list(row) == [
            "tau", "status", "certified_floor", "accuracy", "floor_met", "mean_cost_usd", "share", "baselines",
        ]  # fmt: skip
        assert list(row["share"]) == list(synthetic.CANDIDATES)
        assert sum(row["share"].values()) == pytest.approx(1.0)
        assert list(row["baselines"]) == BASELINES
        assert row["floor_met"] is (row["accuracy"] >= row["tau"])
        assert row["status"] in ("FEASIBLE", "INFEASIBLE")


def test_the_default_targets_are_relative_to_the_fit_rows(report: Report, division: Division) -> None:
    fit = division.fit
    expected = relative_targets(fit.score.mean(axis=0), fit.cost_usd.mean(axis=0), RELATIVE_TARGETS)
    assert [row.tau for row in report.rows] == pytest.approx(expected.tolist(), abs=1e-6)


def test_figures_are_what_the_choices_got(
    report: Report, router: Router, test_table: OutcomeTable, division: Division
) -> None:
    best = int(division.calibration.score.mean(axis=0).argmax())
    for row in report.rows:
        decisions = [router.route(prompt, row.tau) for prompt in test_table.prompts[:50]]
        batch = router.route_batch(router.encode(test_table.prompts), row.tau)
        assert [decision.choice for decision in decisions] == batch.choice[:50].tolist()
        rows = np.arange(len(test_table))
        assert row.accuracy == pytest.approx(test_table.score[rows, batch.choice].mean())
        assert row.mean_cost_usd == pytest.approx(test_table.cost_usd[rows, batch.choice].mean())
        assert row.share["large"] == pytest.approx((batch.choice == 3).mean())
        assert row.status == decisions[0].status.name
        assert row.certified_floor == decisions[0].certified_floor
        assert row.baselines.best_fixed_usd == pytest.approx(test_table.cost_usd[:, best].mean())
        for got, expected in (
            (row.baselines.hull_usd, hull_cost(test_table, row.tau)),
            (row.baselines.oracle_usd, oracle_cost(test_table, row.tau)),
        ):
            assert (got is None) == np.isnan(expected)
            assert got is None or got == pytest.approx(expected)


def test_routing_pays_where_texts_show_their_topic(report: Report) -> None:
    middle = [row for row in report.rows[2:8] if row.status == "FEASIBLE"]
    assert len(middle) >= 4
    # two standard deviations of the test rows' own noise below the floor
    assert all(row.accuracy > row.tau - 0.04 for row in middle)
    ratios = [row.mean_cost_usd / (row.baselines.hull_usd or np.nan) for row in middle]
    assert np.exp(np.mean(np.log(ratios))) < 0.8
    assert all(row.baselines.oracle_usd is None or row.baselines.oracle_usd <= row.mean_cost_usd for row in middle)
    for name in ("knn_usd", "tfidf_ridge_usd"):
        assert all(getattr(row.baselines, name) is not None for row in middle)


@pytest.mark.usefixtures("few_trials")
def test_what_cannot_be_reached_is_null(router: Router, test_table: OutcomeTable, division: Division) -> None:
    rows = evaluate(router, test_table, [0.0, 0.999], division=division).rows
    assert [row.status for row in rows] == ["FEASIBLE", "INFEASIBLE"]
    low, high = rows
    assert low.mean_cost_usd == pytest.approx(test_table.cost_usd[:, 0].mean(), rel=0.2)
    assert not high.floor_met
    assert high.certified_floor == router.tau_max
    assert high.baselines._asdict() == dict.fromkeys(BASELINES) | {"best_fixed_usd": high.baselines.best_fixed_usd}
    assert high.baselines.best_fixed_usd is not None


def test_without_train_and_val_no_baseline_is_fitted(router: Router, test_table: OutcomeTable) -> None:
    report = evaluate(router, test_table, [0.7])
    baselines = report.to_json()["rows"][0]["baselines"]
    assert [baselines[name] for name in BASELINES[2:]] == [None, None, None]
    assert baselines["hull_usd"] > baselines["oracle_usd"] > 0
    assert "no baseline was fitted" in report.to_markdown()


def test_the_calibrated_guarantee_promises_nothing(router: Router, test_table: OutcomeTable) -> None:
    report = evaluate(router, test_table, [0.7, 0.999], guarantee="calibrated")
    assert [(row.status, row.certified_floor) for row in report.rows] == [("UNCERTIFIED", None), ("INFEASIBLE", None)]
    certified = evaluate(router, test_table, [0.7])
    assert report.rows[0].mean_cost_usd < certified.rows[0].mean_cost_usd


def test_markdown_has_a_line_for_every_target(report: Report) -> None:
    lines = [line for line in report.to_markdown().splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(report.rows)
    assert len({line.count("|") for line in lines}) == 1
    assert "nan" not in report.to_markdown()
    assert "best fixed candidate: large" in report.to_markdown()


def test_the_plot_is_a_picture(report: Report, tmp_path: Path) -> None:
    report.plot(tmp_path / "frontier")
    assert (tmp_path / "frontier").read_bytes().startswith(b"\x89PNG")
    assert [frontier.name for frontier in report.frontiers] == ["proteus", "knn", "tfidf_ridge", "hull", "oracle"]
    for frontier in report.frontiers:
        assert np.isfinite(frontier.accuracy).all()
        assert np.isfinite(frontier.cost_usd).all()


@pytest.mark.usefixtures("few_trials")
def test_the_order_of_columns_does_not_matter(router: Router, test_table: OutcomeTable, division: Division) -> None:
    turned = ("large", "coder", "small", "medium")
    reports = [
        evaluate(
            router,
            test_table.with_candidates(order),
            [0.65, 0.75],
            division=Division(division.fit.with_candidates(order), division.calibration.with_candidates(order)),
        )
        for order in (synthetic.CANDIDATES, turned)
    ]
    assert reports[0].to_json() == reports[1].to_json()
    assert reports[0].notes == reports[1].notes == ()


def test_a_table_without_a_candidate_is_refused(router: Router, test_table: OutcomeTable) -> None:
    with pytest.raises(ValueError, match="got none named 'medium'"):
        evaluate(router, test_table.with_candidates(("small", "coder", "large")))
    with pytest.raises(ValueError, match="tau: expected"):
        evaluate(router, test_table, [1.5])


def test_prompts_of_other_splits_are_a_leak(router: Router, test_table: OutcomeTable, division: Division) -> None:
    one = division.fit.take(np.array([3]))
    padded = OutcomeTable("t", (f" {one.prompts[0]}\n",), one.tasks, one.candidates, one.score, one.cost_usd)
    with pytest.raises(LeakError, match="synthetic/test: expected no prompt of train or val, got 1"):
        evaluate(router, concatenate(test_table, padded), division=division)


@pytest.mark.usefixtures("few_trials")
def test_a_split_that_the_router_has_seen_is_called_so(router: Router, folder: Path, division: Division) -> None:
    report = evaluate(router, read_table(folder / "val.parquet"), [0.7], split="val", division=division)
    assert any("not held-out figures" in note for note in report.notes)


def test_labels_in_the_predictions_trip_the_alarm(division: Division, test_table: OutcomeTable) -> None:
    """The true scores for p, as a router whose features hold the label would have them."""
    x = division.calibration.score.astype(np.float32)
    leaky = Router(plug_in_checkpoint(division.fit, division.fit.score, division.calibration, x, delta=0.1, seed=0))
    report = evaluate(leaky, test_table, [0.8, 1.0], x=test_table.score.astype(np.float32))
    assert report.alarm is not None
    assert "labels may have reached the router" in report.alarm
    assert report.alarm in report.to_markdown()


def test_an_honest_router_trips_no_alarm_at_any_target(router: Router, test_table: OutcomeTable) -> None:
    report = evaluate(router, test_table, np.linspace(0, 1, 51).tolist())
    assert report.alarm is None
    # nor by chance on few rows
    for seed in range(20):
        few = test_table.take(np.random.default_rng(seed).choice(len(test_table), 30, replace=False))
        assert evaluate(router, few, [0.8]).alarm is None


def test_a_candidate_that_is_never_beaten_trips_no_alarm(router: Router, test_table: OutcomeTable) -> None:
    best = int(np.argmax(router.pool.mean_score))
    for seed in range(20):
        score = np.random.default_rng(seed).random(test_table.score.shape)
        score[:, best] = score.max(axis=1)
        assert evaluate(router, replace(test_table, score=score), [1.0]).alarm is None


def test_rows_that_were_trained_on_are_called_so(router: Router, test_table: OutcomeTable, division: Division) -> None:
    known = division.fit.take(np.random.default_rng(0).permutation(len(division.fit)))
    notes = evaluate(router, known, [0.6]).notes
    assert any("was trained on about 100.0% of these queries" in note for note in notes)
    mixed = concatenate(test_table, known.take(np.arange(100)))
    assert any("not held-out figures" in note for note in evaluate(router, mixed, [0.6]).notes)
    assert not any("held-out" in note for note in evaluate(router, test_table, [0.6]).notes)


def test_shuffled_scores_are_noted(router: Router, test_table: OutcomeTable) -> None:
    random = np.random.default_rng(0)
    score = np.stack([random.permutation(column) for column in test_table.score.T], axis=1)
    shuffled = OutcomeTable("t", test_table.prompts, (), test_table.candidates, score, test_table.cost_usd)
    assert any("hardly correlated" in note for note in evaluate(router, shuffled, [0.6]).notes)


@pytest.mark.usefixtures("few_trials")
def test_other_calibration_rows_are_noted(router: Router, test_table: OutcomeTable, division: Division) -> None:
    fewer = Division(division.fit, division.calibration.take(np.arange(300)))
    assert any("certified on other rows" in note for note in evaluate(router, test_table, [0.6], division=fewer).notes)


def test_a_router_trained_on_permuted_labels_is_no_better_than_the_hull(
    folder: Path, tmp_path: Path, train_on: Train, router: Router, many_rows: OutcomeTable
) -> None:
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        table = read_table(folder / f"{split}.parquet")
        order = random.permutation(len(table))
        permuted = OutcomeTable(
            table.name, table.prompts, table.tasks, table.candidates, table.score[order], table.cost_usd[order]
        )
        synthetic.write_table(tmp_path / "synthetic" / f"{split}.parquet", permuted)
    price = read_division(folder).fit.cost_usd.mean(axis=0)
    taus = relative_targets(many_rows.score.mean(axis=0), price, SELECTION_TARGETS)
    hull = np.array([hull_cost(many_rows, float(tau)) for tau in taus])
    ratios = []
    for trained in (train_on(tmp_path / "synthetic"), router):
        p = trained.snapshot.scores(trained.encode(many_rows.prompts), 0.5)[5].astype(np.float64)
        costs = plug_in_curve(p, price, many_rows).costs(taus, many_rows)
        ratios.append(np.exp(np.log(costs / hull).mean()))
    assert ratios[0] > 0.95
    assert ratios[1] < 0.7


def test_statuses_are_named_as_the_protocol_names_them(report: Report) -> None:
    assert {row.status for row in report.rows} <= set(Status.__members__)
