"""The deliberately leaky run: leaks are told by the alarm, the honest run is not, and nothing hides what it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from proteus_fast.evaluation.metrics import leak_limit
from proteus_fast.evaluation.report import LeakError
from proteus_fast.experiments import leak
from proteus_fast.experiments.study import Study, measure
from proteus_fast.training.fit_policy import build_trainer
from proteus_fast.training.ppo import PolicyConfig
from tests.experiments import studies

CONFIG = PolicyConfig(hidden=16, steps=4, sessions=8, batch=16, minibatch=64)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return studies.prepare(tmp_path_factory.mktemp("data"), 1500, seed=1, table_rows=1 << 12)


@pytest.fixture(scope="module")
def prepared(study: Study) -> leak.Leak:
    return leak.prepare(study)


def test_leak(study: Study, tmp_path: Path) -> None:
    done: list[None] = []
    result = leak.leak([study], 1, lambda: done.append(None), CONFIG)
    assert len(done) == len(leak.VARIANTS)
    result.write(tmp_path)
    assert (tmp_path / f"{result.stem}.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / f"{result.stem}.md").read_text()
    assert "DELIBERATELY LEAKY" in text.splitlines()[0]
    assert all(len(row) == len(result.columns) for row in result.rows)
    facts = json.loads((tmp_path / f"{result.stem}.json").read_text())["synthetic"]
    runs = {variant: facts[variant][0] for variant in leak.VARIANTS}
    assert all(variant == leak.HONEST or variant.startswith("LEAKY") for variant in runs)
    # the alarm tells the loud leaks from the honest run
    assert not runs[leak.HONEST]["alarm"]
    assert runs[leak.TRUE_SCORES]["alarm"]
    assert runs[leak.TEST_PROMPTS]["alarm"]
    # every leak looks better than the honest run
    for variant in leak.VARIANTS[1:]:
        assert runs[variant]["gap"] > runs[leak.HONEST]["gap"]
    assert runs[leak.TRUE_SCORES]["cost_usd"][1] < runs[leak.HONEST]["cost_usd"][1]
    # and none beats the oracle, which the figures hold as well
    assert max(run["accuracy"][0] for run in runs.values()) <= facts["oracle"]["accuracy"][0]
    assert facts["leak_limit"] == leak_limit(study.test)


def test_an_honest_measurement_refuses_the_leak(study: Study, prepared: leak.Leak) -> None:
    inputs = leak.inputs_of(prepared, leak.TRUE_SCORES, 0)
    leaky = replace(study, problem=inputs.problem, rows=inputs.rows, taus=np.linspace(0.9, 1.0, 17))
    with pytest.raises(LeakError):
        measure(leaky, build_trainer(inputs.problem, CONFIG, 0))


def test_honest_inputs_are_the_studys(study: Study, prepared: leak.Leak) -> None:
    honest = leak.inputs_of(prepared, leak.HONEST, 0)
    assert honest.problem is study.problem
    assert honest.rows is study.rows


def test_what_a_split_by_rows_knows(study: Study, prepared: leak.Leak) -> None:
    fit = len(study.problem.table)
    known = prepared.known_pairs(0)
    assert known[:fit].all()
    assert known[fit:].mean() == pytest.approx(leak.KNOWN_PAIRS, abs=0.05)
    assert not np.array_equal(known, prepared.known_pairs(1))
    everything = np.ones_like(known)
    fit_p, test_p = prepared.predictions(prepared.loud, everything)
    plain = prepared.predictions(prepared.loud)
    assert np.allclose(test_p, plain[1], atol=1e-3)
    assert np.allclose(fit_p, plain[0], atol=1e-3)
    # a pair that is known draws its own prediction to its score, one that is not says little
    test_p = prepared.predictions(prepared.loud, known)[1]
    error, held = np.abs(test_p - study.test.score), ~known[fit:]
    assert error[~held].mean() < 0.7 * error[held].mean()
