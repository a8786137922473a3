"""The command line of experiments: figures as JSON, a table and a plot beside it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from proteus_fast import cli
from proteus_fast.experiments import policies, registry, study
from proteus_fast.training.ppo import PolicyConfig
from tests.evaluation import synthetic

SMALL = PolicyConfig(hidden=8, steps=4, sessions=4, batch=8, minibatch=32, knots=6)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_splits(tmp_path_factory.mktemp("data") / "synthetic", synthetic.outcome_table(400, seed=3))


def test_every_name_has_its_function() -> None:
    assert set(registry.NAMES) == set(cli._EXPERIMENTS)
    for name in registry.NAMES:
        assert callable(registry.experiment(name))
    with pytest.raises(ValueError, match="name: expected one of correlation"):
        registry.experiment("alchemy")


def test_correlation_prints_its_figures(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(policies, "INDEXED", SMALL)
    monkeypatch.setattr(policies, "SCALAR", replace(SMALL, head="free", dual="scalar"))
    words = ["experiment", "correlation", "--data", str(data), "--seeds", "1", "--json", "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--cache", str(tmp_path / "cache")]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures) == {"indexed", "scalar"}
    for one in figures.values():
        assert {"tau_mu", "tau_accuracy", "cost_ratio"} <= set(one)
        assert -1.0 <= one["tau_mu"] <= 1.0
        assert one["cost_ratio"] > 0.0
    # a residual head that has hardly moved is the dual table, and that follows tau
    assert figures["indexed"]["tau_mu"] > 0.9
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".json", ".md", ".png"]
    # what is cached gives the same figures again
    assert cli.main([*words, "--cache", str(tmp_path / "cache")]) == 0
    assert json.loads(capsys.readouterr().out) == figures


def test_test_prompts_in_training_end_the_experiment(data: Path, tmp_path: Path) -> None:
    for name in ("train", "val"):
        (tmp_path / f"{name}.parquet").write_bytes((data / f"{name}.parquet").read_bytes())
    (tmp_path / "test.parquet").write_bytes((data / "val.parquet").read_bytes())
    with pytest.raises(study.LeakError, match="expected no test prompt"):
        study.load_study(tmp_path)


@pytest.mark.parametrize("words", [["alchemy"], ["correlation", "--seeds", "0"], ["correlation", "--seeds", "x"]])
def test_wrong_words(data: Path, words: list[str]) -> None:
    command = ["experiment", *words, "--data", str(data)]
    try:
        status = cli.main(command)
    except SystemExit as error:
        status = int(error.code or 0)
    assert status == 2
