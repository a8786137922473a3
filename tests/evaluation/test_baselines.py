"""Text baselines against scikit-learn's own estimators, their tuning, and their certificate."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsRegressor

from proteus_fast.certificate import Status, lower_bound
from proteus_fast.evaluation import baselines
from proteus_fast.evaluation.baselines import (
    Baseline,
    best_fixed,
    fit_knn,
    fit_text_baselines,
    fit_tfidf_ridge,
    ridge_path,
    tfidf,
)
from proteus_fast.evaluation.links import LINKS, through_link
from proteus_fast.evaluation.metrics import (
    SELECTION_TARGETS,
    hull_cost,
    plug_in_curve,
    realised,
    relative_targets,
    selection_cost,
)
from proteus_fast.evaluation.outcomes import Division, OutcomeTable, fold_of
from proteus_fast.training.calibrate import plug_in_checkpoint
from tests.evaluation import synthetic


@pytest.fixture(scope="module")
def fitted(division: Division) -> tuple[Baseline, Baseline]:
    return fit_text_baselines(division.fit)


def test_ridge_is_ridge() -> None:
    random = np.random.default_rng(0)
    x = scipy.sparse.random(200, 300, density=0.05, format="csr", random_state=0, dtype=np.float32)
    y = random.random((200, 3))
    for alpha, weight, intercept in ridge_path(x, y, baselines.ALPHAS):
        expected = Ridge(alpha=alpha).fit(x.toarray().astype(np.float64), y)
        np.testing.assert_allclose(weight.T, expected.coef_, rtol=0, atol=2e-4)
        np.testing.assert_allclose(intercept, expected.intercept_, rtol=0, atol=2e-4)


def test_ridge_on_equal_targets_is_their_mean() -> None:
    x = scipy.sparse.random(30, 40, density=0.2, format="csr", random_state=0, dtype=np.float32)
    for _, weight, intercept in ridge_path(x, np.full((30, 2), 0.25), (4.0, 1.0)):
        assert np.array_equal(weight, np.zeros((40, 2)))
        assert intercept == pytest.approx([0.25, 0.25])


def test_knn_is_the_mean_of_the_nearest(
    division: Division, test_table: OutcomeTable, fitted: tuple[Baseline, ...]
) -> None:
    knn = fitted[0]
    vectors = next(v for v in tfidf(division.fit.prompts) if v.min_documents == knn.setting["min_documents"])
    expected = KNeighborsRegressor(int(knn.setting["k"]), metric="cosine", algorithm="brute").fit(
        vectors.x, division.fit.score
    )
    got = knn.predict(test_table.prompts)
    means = expected.predict(vectors.of(test_table.prompts))
    means = through_link(means, division.fit.score.mean(axis=0), knn.link)
    # where several rows are equally far, which of them are taken is open
    same = np.isclose(got, means, atol=1e-9).all(axis=1)
    assert same.mean() > 0.98


def test_more_neighbours_than_rows_are_all_rows() -> None:
    table = synthetic.outcome_table(12)
    knn = fit_knn(table)
    assert knn.p.shape == (12, 4)
    assert np.isfinite(knn.p).all()
    assert knn.predict(["nothing like it"]).shape == (1, 4)


def test_settings_are_those_of_the_least_out_of_fold_cost(
    division: Division, fitted: tuple[Baseline, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = division.fit
    price = fit.cost_usd.mean(axis=0)
    knn, ridge = fitted
    for baseline, grid, setting in ((knn, "NEIGHBOURS", "k"), (ridge, "ALPHAS", "alpha")):
        assert baseline.cost_usd == selection_cost(baseline.p, price, fit)
        assert ((baseline.p >= 0) & (baseline.p <= 1)).all()
        monkeypatch.setattr(baselines, "MIN_DOCUMENTS", (int(baseline.setting["min_documents"]),))
        for link in LINKS:
            with monkeypatch.context() as patch:
                patch.setattr(baselines, "LINKS", (link,))
                alone = fit_knn(fit) if baseline is knn else fit_tfidf_ridge(fit)
            assert alone.cost_usd >= baseline.cost_usd
            assert alone.cost_usd == baseline.cost_usd or link != baseline.link
        for other in (getattr(baselines, grid)[0], getattr(baselines, grid)[-1]):
            with monkeypatch.context() as patch:
                patch.setattr(baselines, grid, (other,))
                again = fit_knn(fit) if baseline is knn else fit_tfidf_ridge(fit)
            assert again.setting[setting] == other
            assert again.cost_usd >= baseline.cost_usd


@pytest.mark.usefixtures("few_trials")
def test_no_row_sees_labels_of_its_own_fold(division: Division, monkeypatch: pytest.MonkeyPatch) -> None:
    # the sigmoid link has the mean of all rows, as ours has
    monkeypatch.setattr(baselines, "LINKS", ("clip",))
    fit = division.fit
    held = fold_of(fit.prompts) == 2
    score = fit.score.copy()
    score[held] = 1.0 - score[held]
    other = OutcomeTable(fit.name, fit.prompts, fit.tasks, fit.candidates, score, fit.cost_usd)
    for honest, spoilt in zip(fit_text_baselines(fit), fit_text_baselines(other), strict=True):
        assert np.array_equal(honest.p[held], spoilt.p[held]), honest.name
        assert not np.array_equal(honest.p[~held], spoilt.p[~held]), honest.name


def test_text_baselines_find_what_the_text_shows(
    division: Division, test_table: OutcomeTable, fitted: tuple[Baseline, ...]
) -> None:
    fit = division.fit
    price = fit.cost_usd.mean(axis=0)
    known = synthetic.SKILL[[synthetic.TOPICS.index(task) for task in test_table.tasks]]
    best = selection_cost(known, price, test_table)
    for baseline in fitted:
        predicted = np.clip(baseline.predict(test_table.prompts), 0, 1)
        assert selection_cost(predicted, price, test_table) < 1.3 * best, baseline.name


@pytest.mark.usefixtures("few_trials")
def test_permuted_labels_teach_nothing(division: Division, many_rows: OutcomeTable) -> None:
    """Fitted on prompts whose outcomes belong to other prompts, a predictor does no better than fixed candidates."""
    fit = division.fit
    order = np.random.default_rng(0).permutation(len(fit))
    permuted = OutcomeTable(fit.name, fit.prompts, (), fit.candidates, fit.score[order], fit.cost_usd[order])
    price = fit.cost_usd.mean(axis=0)
    taus = relative_targets(many_rows.score.mean(axis=0), price, SELECTION_TARGETS)
    hull = np.array([hull_cost(many_rows, float(tau)) for tau in taus])
    for fitted_on, least, most in ((permuted, 0.95, 2.0), (fit, 0.0, 0.7)):
        for baseline in fit_text_baselines(fitted_on):
            predicted = np.clip(baseline.predict(many_rows.prompts), 0, 1)
            costs = plug_in_curve(predicted, price, many_rows).costs(taus, many_rows)
            assert least < np.exp(np.log(costs / hull).mean()) < most, baseline.name


def test_a_certified_baseline_serves_its_own_rule(
    division: Division, test_table: OutcomeTable, fitted: tuple[Baseline, ...]
) -> None:
    for baseline in fitted:
        router = baseline.certified(division, delta=0.1, seed=0)
        config, certificate = router.checkpoint.config, router.certificate
        x = baseline.predict(test_table.prompts).astype(np.float32)
        p = np.clip(x.astype(np.float64), 0, 1)
        c = router.pool.price_usd / config.cost_unit_usd
        for tau in (0.6, 0.7, 0.75):
            batch = router.route_batch(x, tau)
            assert (batch.status == Status.FEASIBLE).all()
            weight = config.kappa * (1.0 - batch.mu.astype(np.float64)) ** config.gamma
            scores = p - weight[:, None] * c
            top = np.sort(scores, axis=1)
            clear = top[:, -1] - top[:, -2] > 1e-5
            assert np.array_equal(batch.choice[clear], scores.argmax(axis=1)[clear])
            # honest rows: the floor of .1 is broken by luck at most now and then, never by much
            assert realised(test_table, batch.choice)[0] > tau - 0.03
        # the floor that is promised is one that the exact bound of the counted rows reaches
        table = certificate.tables["dual"]["certified"]
        successes = int(certificate.paths["dual"].successes[table.code[table.max_index]])
        assert lower_bound(successes, certificate.n, 0.1) >= table.max_index / 1000 - 1e-9


def test_baselines_and_router_share_their_calibration_rows(division: Division, fitted: tuple[Baseline, ...]) -> None:
    hashes = {b.certified(division, delta=0.1, seed=0).certificate.data_sha256 for b in fitted}
    assert hashes == {division.calibration.sha256}


def test_a_baseline_with_true_scores_is_certified_to_the_oracle(division: Division) -> None:
    """The wrapper adds nothing of its own: with the truth for p it reaches what the truth allows."""
    x = division.calibration.score.astype(np.float32)
    source = plug_in_checkpoint(division.fit, division.fit.score, division.calibration, x, delta=0.1, seed=0)
    successes = source.certificate.paths["dual"].successes
    assert successes[0] == division.calibration.score.max(axis=1).sum()


def test_best_fixed_is_by_calibration_rows(division: Division) -> None:
    means = [division.calibration.score[:, i].mean() for i in range(4)]
    assert best_fixed(division.calibration) == means.index(max(means))


def test_prompts_without_any_word_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one word"):
        tfidf(["?!", "..."])
