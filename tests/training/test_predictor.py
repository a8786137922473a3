"""The closed form: shrinkage, quantisation, and a table that says what the regression says."""

from __future__ import annotations

import numpy as np
import pytest

from proteus_fast import _core
from proteus_fast.demo_queries import queries
from proteus_fast.evaluation.links import LINKS, Link, linked_head, through_link
from proteus_fast.evaluation.outcomes import FOLDS, fold_of
from proteus_fast.training import predictor

ROWS = 1 << 12


@pytest.fixture(scope="module")
def problem() -> tuple[predictor.Features, np.ndarray, np.ndarray]:
    texts = queries()
    random = np.random.default_rng(0)
    hard = np.array([0.2 + 0.6 * ("f(" in text or "house" in text) for text in texts])
    score = (random.random((len(texts), 5)) > hard[:, None] * np.linspace(0.4, 1.0, 5)).astype(np.float64)
    return predictor.hash_features(texts, ROWS), score, fold_of(texts)


def test_blocks_have_unit_norm(problem: tuple[predictor.Features, np.ndarray, np.ndarray]) -> None:
    features, _, _ = problem
    for block in features.blocks[:3]:
        norm = np.sqrt(np.asarray(block.multiply(block).sum(axis=1)).ravel())
        assert np.all(np.isclose(norm, 1.0) | (norm == 0.0))
    combined = features.combined((1.0, 0.0, 0.0, 0.0))
    assert abs(combined - features.blocks[0]).max() == 0.0


def test_out_of_fold_predictions_do_not_see_their_own_labels(
    problem: tuple[predictor.Features, np.ndarray, np.ndarray],
) -> None:
    features, score, fold = problem
    x = features.combined((1.0, 1.0, 1.0, 0.5))
    kernel = predictor.gram(x, x)
    first = predictor.out_of_fold(kernel, score.astype(np.float32), fold, [2.0])[0]
    changed = score.copy()
    changed[fold == 2] = 1.0 - changed[fold == 2]
    second = predictor.out_of_fold(kernel, changed.astype(np.float32), fold, [2.0])[0]
    assert np.array_equal(first[fold == 2], second[fold == 2])
    assert all(not np.array_equal(first[fold == k], second[fold == k]) for k in range(FOLDS) if k != 2)


def test_out_of_fold_is_plain_ridge(problem: tuple[predictor.Features, np.ndarray, np.ndarray]) -> None:
    from sklearn.linear_model import Ridge

    features, score, fold = problem
    x = features.combined((1.0, 1.0, 1.0, 0.5))
    ours = predictor.out_of_fold(predictor.gram(x, x), score.astype(np.float32), fold, [0.5, 2.0])[1]
    for number in range(FOLDS):
        held = fold == number
        mean = score[~held].mean(axis=0)
        model = Ridge(alpha=2.0, fit_intercept=False).fit(x[~held].toarray(), score[~held] - mean)
        assert np.abs(ours[held] - model.predict(x[held].toarray()) - mean).max() < 1e-4


def test_variants_of_shrinkage(problem: tuple[predictor.Features, np.ndarray, np.ndarray]) -> None:
    features, score, fold = problem
    x = features.combined((1.0, 1.0, 1.0, 0.5))
    kernel = predictor.gram(x, x)
    alphas = (1.0, 4.0, 16.0)
    found = predictor.fit_shrinkages(kernel, score, fold, alphas, ["each+0", "each+1", "all@0", "all@1", "all@2"])
    each = found["each+0"]
    assert all(each.error <= other.error + 1e-12 for other in found.values())
    assert np.allclose(each.rotation.T @ each.rotation, np.eye(5), atol=1e-9)
    assert np.all(found["each+1"].alpha >= each.alpha)
    for i, alpha in enumerate(alphas):
        one = found[f"all@{i}"]
        assert set(one.alpha) == {alpha}
        plain = predictor.out_of_fold(kernel, (score - score.mean(axis=0)).astype(np.float32), fold, [alpha])[0]
        assert np.abs(one.p - plain - score.mean(axis=0)).max() < 1e-4
    with pytest.raises(ValueError, match="variants: expected"):
        predictor.fit_shrinkages(kernel, score, fold, alphas, ["all@3"])


def test_the_table_says_what_the_regression_says(problem: tuple[predictor.Features, np.ndarray, np.ndarray]) -> None:
    """Through int8, hashing in C++ and the encoder: predictions are those of the exact dual solution."""
    features, score, fold = problem
    weights = (1.0, 0.5, 1.0, 0.5)
    x = features.combined(weights)
    kernel = predictor.gram(x, x)
    shrinkage = predictor.fit_shrinkages(kernel, score, fold, (1.0, 4.0), ["each+0"])["each+0"]
    dual = predictor.fit_dual(kernel, score, shrinkage)
    hashed = predictor.build_table(features, weights, dual, score.mean(axis=0), 5 + 16, seed=0)
    exact = kernel @ dual + score.mean(axis=0)
    served = hashed.encode(queries()) @ hashed.weight + hashed.bias
    assert np.abs(served - exact).max() < 0.01
    assert np.abs(served - exact).mean() < 0.001


def test_texts_of_the_fit_rows_set_the_document_frequencies() -> None:
    fit = predictor.hash_features(["one two", "one three"], ROWS)
    other = predictor.hash_features(["one four"], ROWS, fit.idf)
    assert other.idf is fit.idf
    _, index, _, block = _core.hash_features(["one"], ROWS)
    one = index[block == 0][0]
    assert fit.idf[one] == pytest.approx(1.0, abs=1e-6)
    assert fit.idf.max() == pytest.approx(np.log(3.0) + 1.0, abs=1e-6)


def test_quantise_rounds_to_half_a_step() -> None:
    directions = np.random.default_rng(1).standard_normal((500, 20)) * np.geomspace(1e-6, 1e3, 500)[:, None]
    directions[7] = 0.0
    table, scale = predictor.quantise(directions)
    assert table.dtype == np.int8
    assert np.all(np.abs(table * scale[:, None].astype(np.float64) - directions) <= 0.5001 * scale[:, None] + 1e-30)
    assert not table[7].any()


def test_logits_are_tangent_to_the_line_at_the_mean() -> None:
    mean = np.array([0.3, 0.9, 1.0])
    p = through_link(np.tile(mean, (2, 1)), mean, "sigmoid")
    np.testing.assert_allclose(p, np.tile([0.3, 0.9, 0.98], (2, 1)))
    step = 1e-6
    slope = (through_link(mean + step, mean, "sigmoid") - p[0]) / step
    # no steeper than at .9: where a candidate never fails, nothing says how fast it would begin to
    np.testing.assert_allclose(slope, [1.0, 1.0, 0.02 * 0.98 / 0.09], atol=1e-4)
    assert through_link(np.array([-9.0, 9.0, 0.5]), mean, "clip").tolist() == [0.0, 1.0, 0.5]


@pytest.mark.parametrize("link", LINKS)
def test_a_linked_head_predicts_what_the_link_says(link: Link) -> None:
    random = np.random.default_rng(3)
    h, weight, bias = random.standard_normal((9, 4)), random.standard_normal((4, 3)) * 0.2, random.random(3)
    mean = np.array([0.4, 0.7, 0.999])
    found = linked_head(weight, bias, mean, link)
    values = h @ found[0] + found[1]
    p = np.clip(values, 0.0, 1.0) if link == "clip" else 1.0 / (1.0 + np.exp(-values))
    np.testing.assert_allclose(p, through_link(h @ weight + bias, mean, link), atol=1e-5)
