"""A hash encoder that learns from a teacher: nobody sees what he is judged by, and the table says what was learnt."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from proteus_fast import checkpoint
from proteus_fast.cli import main
from proteus_fast.encoder import describe
from proteus_fast.evaluation.links import LINKS, through_link
from proteus_fast.evaluation.outcomes import FOLDS, OutcomeTable, fold_of, read_division
from proteus_fast.router import Router
from proteus_fast.training import distil, predictor
from proteus_fast.training.distil import Teacher, cross_fit_student, fit_student, read_prompts
from proteus_fast.training.fit_predictor import TeacherTexts, fit_predictor
from proteus_fast.training.stages import Stages
from proteus_fast.training.train import TrainConfig, train
from tests import encoders
from tests.evaluation import synthetic

# a regression on labels that learns next to nothing, so that the teacher's is sure to be wanted
WEAK: dict[str, Any] = {"alphas": (512.0,), "variants": ("all@0",), "block_weights": ((1.0, 1.0, 1.0, 0.0),)}


@pytest.fixture(scope="module")
def table() -> OutcomeTable:
    return synthetic.outcome_table(500, seed=4)


@pytest.fixture(scope="module")
def data(table: OutcomeTable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_splits(tmp_path_factory.mktemp("data") / "synthetic", table)


@pytest.fixture(scope="module")
def directory(table: OutcomeTable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = sorted({word for prompt in table.prompts for word in prompt.split()})
    return encoders.make("bert", tmp_path_factory.mktemp("encoder"), words)


def settings(data: Path, out: Path, directory: Path, **changes: Any) -> TrainConfig:
    made = TrainConfig(
        data=data, out=out, teacher=str(directory), max_tokens=30, table_rows=1 << 11, extra_dim=4, refine=False,
        progress=False, **WEAK,
    )  # fmt: skip
    return replace(made, **changes)


def problem(table: OutcomeTable) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Kernel of the hashed features, embeddings, scores and folds of 240 rows, of the last 60 no scores."""
    texts = table.prompts[:240]
    features = predictor.hash_features(texts, 1 << 11)
    x = features.combined((1.0, 0.0, 0.0, 0.0))
    h = np.random.default_rng(0).standard_normal((240, 8)).astype(np.float32)
    fold = np.concatenate([fold_of(texts[:180]), np.full(60, distil.UNLABELLED)])
    return predictor.gram(x, x), h, table.score[:180], fold


def one_alpha(kernel: np.ndarray, h: np.ndarray, score: np.ndarray, fold: np.ndarray) -> Teacher:
    return Teacher(kernel[:, : len(score)], h, score, fold[: len(score)], ((0.5, 1.0),), (1.0,))


def test_a_teacher_has_not_seen_what_it_may_not_see(table: OutcomeTable) -> None:
    kernel, h, score, fold = problem(table)
    scrambled = score.copy()
    scrambled[fold[:180] == 1] = 1.0 - scrambled[fold[:180] == 1]
    first, second = (one_alpha(kernel, h, values, fold) for values in (score, scrambled))
    # penalties are chosen on all folds, once, and are no part of this
    second.shrinkage = first.shrinkage
    for unseen in ({1}, {1, 3}):
        a, b = (teacher.predict(frozenset(unseen)) for teacher in (first, second))
        seen = ~np.isin(fold, list(unseen))
        np.testing.assert_allclose(a[seen], b[seen], atol=2e-5)
        assert np.isnan(a[~seen]).all()
        assert np.isfinite(a[180:]).all()
    # and with nothing forbidden only the fold itself is blind to its labels
    a, b = first.predict(), second.predict()
    np.testing.assert_allclose(a[fold == 1], b[fold == 1], atol=2e-5)
    assert np.abs(a - b)[fold == 2].max() > 1e-3
    assert np.abs(a - b)[180:].max() > 1e-3


def test_a_teacher_is_ridge_regression_with_its_kernel(table: OutcomeTable) -> None:
    kernel, h, score, fold = problem(table)
    teacher = one_alpha(kernel, h, score, fold)
    z = h / np.linalg.norm(h, axis=1, keepdims=True)
    whole = kernel + 0.5 * np.exp(-1.0 * ((z[:, None] - z[None]) ** 2).sum(axis=2))
    seen = np.flatnonzero(np.isin(fold, (0, 1, 3)))
    mean = score[seen].mean(axis=0)
    dual = np.linalg.solve(whole[np.ix_(seen, seen)] + np.eye(len(seen)), score[seen] - mean)
    alive = teacher.shrinkage.rotation[:, np.isfinite(teacher.shrinkage.alpha)]
    assert alive.size
    expected = whole[:, seen] @ dual @ alive @ alive.T + mean
    found = teacher.predict(frozenset({2}))
    np.testing.assert_allclose(found[fold == 4], expected[fold == 4], atol=1e-4)


def test_a_student_is_ridge_regression_on_labels_and_teacher(table: OutcomeTable) -> None:
    """With one penalty for both, mixing two regressions is regressing on the mixture."""
    kernel, h, score, fold = problem(table)
    teacher = one_alpha(kernel, h, score, fold)
    n = len(score)
    labelled = predictor.fit_shrinkages(kernel[:n, :n], score, fold[:n], (1.0,), ("all@0",))
    student, trials = fit_student(
        kernel, teacher, score, fold, labelled, lambda p: float(((p - score) ** 2).mean()), squared_norm=1.0,
        links=LINKS, tick=lambda: None,
    )  # fmt: skip
    assert len(trials) in {n * 2 * len(distil.WEIGHTS) * len(distil.STUDENT_ALPHAS) for n in (1, 2)}
    assert student.trial.cost_usd == min(trial.cost_usd for trial in trials)
    weight, alpha, leading = student.trial.weight, student.trial.alpha, student.shrinkage.rotation
    leading = leading[:, : student.trial.components]
    mixing = weight * leading @ leading.T
    labels = labelled["all@0"].p
    for number in (0, 3):
        held = fold == number
        taught = teacher.predict(frozenset({number}))[~held]
        own = np.linalg.solve(
            kernel[np.ix_(~held, ~held)] + alpha * np.eye((~held).sum()), taught - taught.mean(axis=0)
        )
        p_taught = kernel[np.ix_(held, ~held)] @ own + taught.mean(axis=0)
        expected = labels[held[:n]] + (p_taught - labels[held[:n]]) @ mixing
        np.testing.assert_allclose(student.p[held[:n]], expected, atol=1e-4)
    crossed = cross_fit_student(kernel, teacher, student, fold)
    np.testing.assert_allclose(labels + (crossed.plain[:n] - labels) @ mixing, student.p, atol=1e-4)
    assert crossed.nested.shape == (FOLDS, len(fold), score.shape[1])
    for number in range(FOLDS):
        rows = fold == number
        np.testing.assert_array_equal(crossed.nested[number][rows], crossed.plain[rows])


def test_what_was_learnt_is_in_the_table(data: Path, directory: Path, tmp_path: Path) -> None:
    config = settings(data, tmp_path / "router", directory)
    router = Router.load(train(config))
    log = [json.loads(line) for line in (tmp_path / "router.training" / "log.jsonl").read_text().splitlines()]
    selected = next(entry for entry in log if entry["stage"] == "distil selected")
    assert selected["kept"]
    assert selected["cost_usd"] < selected["cost_usd_without"]
    assert router.checkpoint.config.encoder == "hash"
    assert router.checkpoint.config.source is None
    division = read_division(data)
    fit, texts = division.fit, division.calibration.prompts
    features = predictor.hash_features(fit.prompts, config.table_rows)
    x, weights = features.combined((1.0, 1.0, 1.0, 0.0)), (1.0, 1.0, 1.0, 0.0)
    kernel = predictor.gram(x, x)
    held = predictor.gram(predictor.hash_features(texts, config.table_rows, features.idf).combined(weights), x)
    h = describe_and_encode(config, fit.prompts)
    fold = fold_of(fit.prompts)
    taught = Teacher(kernel / np.float32(3.0), h, fit.score, fold).predict()
    mean = fit.score.mean(axis=0)
    own = predictor.solve_duals(kernel, (fit.score - mean).astype(np.float32), [512.0 * 3.0])[0]
    other = predictor.solve_duals(kernel, (taught - taught.mean(axis=0)).astype(np.float32), [selected["alpha"]])[0]
    leading = np.linalg.svd(fit.score - mean, full_matrices=False)[2].T[:, : selected["components"]]
    by_labels, by_teacher = held @ own + mean, held @ other + taught.mean(axis=0)
    linear = by_labels + selected["weight"] * (by_teacher - by_labels) @ leading @ leading.T
    expected = through_link(linear, mean, selected["link"])
    found = router.snapshot.scores(router.encode(texts), 0.5)[5]
    # the table is rounded to int8
    assert np.abs(found - expected).max() < 0.02
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999


def describe_and_encode(config: TrainConfig, texts: tuple[str, ...]) -> np.ndarray:
    from proteus_fast.encoder import TransformerEncoder

    assert config.teacher is not None
    return np.asarray(TransformerEncoder(describe(config.teacher, config.max_tokens)[0]).encode(texts))


def test_a_policy_sees_what_the_student_predicts(data: Path, directory: Path, tmp_path: Path) -> None:
    config = settings(data, tmp_path / "router", directory, mode="policy")
    source = describe(directory, 30)[0]
    first = fit_predictor(
        config, read_division(data), Stages(tmp_path, "", read_only=True), lambda _: None,
        TeacherTexts(source, ("an unlabelled prompt", "another one")),
    )  # fmt: skip
    found = first.problem
    assert found is not None
    np.testing.assert_array_equal(found.p, first.p)
    for number in range(FOLDS):
        rows = found.fold == number
        np.testing.assert_array_equal(found.nested_p[number][rows], found.p[rows])
        assert not np.array_equal(found.nested_p[number][~rows], found.p[~rows])
    # what the network is given and what it predicts from are one thing: no label of their own in either
    linear = found.z.astype(np.float64) @ first.encoder.weight + first.encoder.bias
    p = np.clip(linear, 0, 1) if first.encoder.link == "clip" else 1 / (1 + np.exp(-linear))
    np.testing.assert_allclose(p, np.clip(found.p, 0, 1), atol=1e-5)


def test_labels_of_the_certificate_do_not_reach_the_student(data: Path, directory: Path, tmp_path: Path) -> None:
    from proteus_fast.evaluation.outcomes import is_cal, read_table

    scrambled = tmp_path / "synthetic"
    train_table, val = (read_table(data / f"{split}.parquet") for split in ("train", "val"))
    hidden = is_cal(train_table.prompts)
    score = train_table.score.copy()
    score[hidden] = 1.0 - score[hidden]
    synthetic.write_table(scrambled / "train.parquet", replace(train_table, score=score))
    synthetic.write_table(scrambled / "val.parquet", replace(val, score=1.0 - val.score))
    first, second = (
        checkpoint.load(train(settings(place, tmp_path / f"router{number}", directory)))
        for number, place in enumerate((data, scrambled))
    )
    for name, tensor in first.tensors.items():
        np.testing.assert_array_equal(tensor, second.tensors[name])
    assert first.certificate.paths["dual"].path.parameter.tolist() == (
        second.certificate.paths["dual"].path.parameter.tolist()
    )


def test_a_teacher_that_does_not_help_is_not_kept(
    data: Path, directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a student that predicts one number for all
    monkeypatch.setattr(distil, "STUDENT_ALPHAS", (1e9,))
    monkeypatch.setattr(distil, "WEIGHTS", (0.999,))
    changes = {"alphas": (1.0, 8.0), "variants": ("each+0",)}
    taught = checkpoint.load(train(settings(data, tmp_path / "taught", directory, **changes)))
    assert "does not make the router cheaper" in caplog.text
    alone = checkpoint.load(
        train(settings(data, tmp_path / "alone", directory, teacher=None, max_tokens=None, **changes))
    )
    assert taught.sha256 == alone.sha256


def test_unlabelled_prompts_are_those_that_nobody_knows(tmp_path: Path) -> None:
    file = tmp_path / "prompts.parquet"
    prompts = ["one", "two ", "two", "three", " one"]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": prompts, "other": list(range(5))}), file)
    assert read_prompts(file, ["one "]) == ("two", "three")
    with pytest.raises(FileNotFoundError, match=r"^unlabelled: expected a Parquet file, got nothing at"):
        read_prompts(tmp_path / "none.parquet", [])
    (tmp_path / "text").write_text("prompt\none\n")
    with pytest.raises(ValueError, match=r"^unlabelled: expected a Parquet file, got"):
        read_prompts(tmp_path / "text", [])
    for columns in ({"text": ["a"]}, {"prompt": [1, 2]}, {"prompt": ["a", None]}):
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
        with pytest.raises(ValueError, match=r"^unlabelled: expected a column prompt of texts"):
            read_prompts(file, [])


def test_wrong_usage(data: Path, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--data", str(data), "--out", str(tmp_path / "x")]
    assert main([*command, "--encoder", str(directory), "--teacher", str(directory)]) == 2
    assert "encoder: expected hash with a teacher, got" in capsys.readouterr().err
    assert main([*command, "--unlabelled", "prompts.parquet"]) == 2
    assert "unlabelled: expected a teacher to ask about the prompts, got none" in capsys.readouterr().err
    assert main([*command, "--teacher", str(directory), "--max-tokens", "1"]) == 2
    assert "max_tokens: expected 2 to 40" in capsys.readouterr().err
    assert main([*command, "--teacher", str(tmp_path / "nowhere")]) != 0
    assert "teacher: expected a directory, got nothing at" in capsys.readouterr().err
