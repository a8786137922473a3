"""Training: deterministic, resumable, and blind to what it may not see."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from proteus_fast import checkpoint
from proteus_fast.certificate import Status
from proteus_fast.cli import main
from proteus_fast.evaluation.outcomes import OutcomeTable, is_cal, read_division, read_table
from proteus_fast.router import Router
from proteus_fast.training import predictor
from proteus_fast.training.ppo import PolicyConfig
from proteus_fast.training.train import TrainConfig, train
from tests.evaluation import synthetic

POLICY = PolicyConfig(
    hidden=16, sessions=4, batch=32, epochs=1, minibatch=32, session_batches=4, knots=8, learning_rate=0.02, steps=9
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_splits(tmp_path_factory.mktemp("data") / "synthetic", synthetic.outcome_table(600, seed=9))


@pytest.fixture(scope="module")
def dear() -> OutcomeTable:
    """A table with two topics whose answers are long, whoever writes them: what a policy can learn."""
    table = synthetic.outcome_table(900, seed=9)
    long = np.array([4.0 if task in ("proofs", "history") else 0.5 for task in table.tasks])
    return replace(table, cost_usd=table.cost_usd * long[:, None])


@pytest.fixture(scope="module")
def with_policy(dear: OutcomeTable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint trained with a policy; the data beside it."""
    folder = tmp_path_factory.mktemp("policy")
    data = synthetic.write_splits(folder / "synthetic", dear)
    return train(policy_settings(data, folder / "router"))


def settings(data: Path, out: Path) -> TrainConfig:
    return TrainConfig(
        data=data, out=out, table_rows=1 << 11, extra_dim=4, alphas=(1.0, 8.0), refine=False, progress=False,
        block_weights=((1.0, 1.0, 1.0, 0.0), (1.0, 1.0, 1.0, 0.5)), variants=("each+0", "all@1"),
    )  # fmt: skip


def policy_settings(data: Path, out: Path, **changes: Any) -> TrainConfig:
    one = {"block_weights": ((1.0, 1.0, 1.0, 0.0),), "variants": ("each+0",)}
    return replace(settings(data, out), **{**one, "mode": "policy", "policy": POLICY, **changes})


def test_a_stopped_run_is_taken_up(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = checkpoint.load(train(settings(data, tmp_path / "whole")))
    real = predictor.fit_shrinkages
    calls = 0

    def stops(*arguments: object, **options: object) -> dict[str, predictor.Shrinkage]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(predictor, "fit_shrinkages", stops)
    with pytest.raises(KeyboardInterrupt):
        train(settings(data, tmp_path / "stopped"))
    assert not (tmp_path / "stopped").exists()
    resumed = checkpoint.load(train(settings(data, tmp_path / "stopped")))
    assert calls == 3
    assert resumed.sha256 == whole.sha256
    assert all(np.array_equal(resumed.tensors[name], whole.tensors[name]) for name in whole.tensors)
    # another seed is another run: nothing of the first is taken up
    other = settings(data, tmp_path / "stopped")
    train(TrainConfig(**{**vars(other), "seed": 5}))
    assert calls == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delta": 0.0}, "delta: expected"),
        ({"delta": float("nan")}, "delta: expected"),
        ({"table_rows": 1000}, "table_rows: expected a power of two"),
        ({"mode": "fast", "policy": POLICY}, "mode: expected"),
        ({"mode": "policy", "policy": POLICY, "device": "abacus"}, "device: expected"),
        *(
            []
            if torch.cuda.is_available()
            else [({"device": "cuda"}, "device: expected 'cpu' where torch sees no CUDA")]
        ),
        ({"seed": -1}, "seed: expected"),
        ({"seed": 1 << 63}, "seed: expected"),
        ({"delta": 1e-10}, "delta: expected"),
    ],
)
def test_wrong_settings(data: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(TrainConfig(**{**vars(settings(data, tmp_path / "x")), **changes}))  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("name", "price", "message"),
    [
        ("a\nb", 0.1, "pool: expected names of"),
        ("a" * 257, 0.1, "pool: expected names"),
        ("a", 2e6, "pool: expected prices"),
    ],
)
def test_what_no_checkpoint_holds_is_refused_before_the_work(
    tmp_path: Path, name: str, price: float, message: str
) -> None:
    table = synthetic.outcome_table(300, seed=3)
    cost = table.cost_usd.copy()
    cost[:, 0] = price
    table = replace(table, candidates=(name, *table.candidates[1:]), cost_usd=cost)
    folder = synthetic.write_splits(tmp_path / "data", table)
    with pytest.raises(ValueError, match=message):
        train(settings(folder, tmp_path / "x"))
    assert not list(tmp_path.glob("x*"))


def log_of(out: Path, stage: str) -> list[dict[str, Any]]:
    lines = (out.with_name(out.name + ".training") / "log.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["stage"] == stage]


def test_a_policy_is_certified_beside_the_plug_in_rule(with_policy: Path) -> None:
    source = checkpoint.load(with_policy)
    assert (source.config.mode, source.config.head) == ("policy", "residual")
    assert set(source.certificate.paths) == {"dual", "policy"}
    assert 2.0 <= source.config.gamma <= 8.0
    for entry in source.certificate.paths.values():
        assert (np.diff(entry.path.expected_cost_usd) < 0).all()
        assert entry.successes.max() > 0
    training = with_policy.with_name("router.training")
    for name in ("curves.json", "curves.png", "policy.png"):
        assert (training / name).stat().st_size > 100
    assert [entry["step"] for entry in log_of(with_policy, "policy")] == [0, 5]
    chosen = log_of(with_policy, "policy selected")[-1]
    assert chosen["steps"] == chosen["tried"][int(np.argmin(chosen["cost_usd"]))]
    assert chosen["mode"] == "policy"


def test_a_policy_answers_with_a_certified_floor(with_policy: Path) -> None:
    router = Router.load(with_policy)
    table = read_table(with_policy.with_name("synthetic") / "test.parquet")
    x = router.encode(table.prompts)
    assert router.mode == "policy"
    assert router.tau_max is not None
    tau = round(router.tau_max - 0.05, 3)
    answer = router.route_batch(x, tau)
    assert (answer.status == Status.FEASIBLE).all()
    np.testing.assert_allclose(answer.certified_floor, tau, atol=1e-6)
    assert (router.route_batch(x, 0.999).status == Status.INFEASIBLE).all()
    # the other mode answers too, without a promise
    other = router.route_batch(x, tau, mode="dual")
    assert (other.status == Status.UNCERTIFIED).all()
    assert router.certificate.tau_max("dual") is not None
    # the preference depends on the query, which that of the dual table does not
    assert len(np.unique(answer.mu)) > len(np.unique(other.mu))
    sampled = router.route_batch(x, tau, sample=True, seed=1)
    assert (sampled.status == Status.UNCERTIFIED).all()


def test_calibration_labels_shape_nothing_of_a_policy(with_policy: Path, dear: OutcomeTable, tmp_path: Path) -> None:
    """With other labels and costs on val and cal, model and both paths are the same to the bit."""
    split = np.array([synthetic.split_of(prompt) for prompt in dear.prompts])
    cal = (split == "val") | ((split == "train") & is_cal(dear.prompts))
    score = np.where(cal[:, None], 1.0 - dear.score, dear.score)
    cost = np.where(cal[:, None], dear.cost_usd[::-1], dear.cost_usd)
    data = synthetic.write_splits(tmp_path / "synthetic", replace(dear, score=score, cost_usd=cost))
    honest = checkpoint.load(with_policy)
    other = checkpoint.load(train(policy_settings(data, tmp_path / "router")))
    assert tuple(honest.config.pool) == tuple(other.config.pool)
    assert replace(honest.config, pool=other.config.pool) == other.config
    assert honest.tensors.keys() == other.tensors.keys()
    for name, tensor in honest.tensors.items():
        assert tensor.tobytes() == other.tensors[name].tobytes(), name
    for mode, entry in honest.certificate.paths.items():
        ours, theirs = entry.path, other.certificate.paths[mode].path
        assert ours.parameter.tobytes() == theirs.parameter.tobytes()
        assert ours.expected_cost_usd.tobytes() == theirs.expected_cost_usd.tobytes()
        # the labels did change: what was counted on them is something else
        assert not np.array_equal(entry.successes, other.certificate.paths[mode].successes)


def test_the_plug_in_rule_is_the_same_with_and_without_a_policy(with_policy: Path, tmp_path: Path) -> None:
    """The cost column is for the policy's eyes only: predicted accuracies differ by the rounding of the table."""
    data = with_policy.with_name("synthetic")
    alone = Router.load(train(policy_settings(data, tmp_path / "dual", mode="dual")))
    beside = Router.load(with_policy)
    assert alone.checkpoint.config.head is None
    assert not [name for name in alone.checkpoint.tensors if name.startswith("policy.")]
    prompts = read_division(data).calibration.prompts
    predicted = [router.snapshot.scores(router.encode(prompts), 0.5, "dual")[5] for router in (alone, beside)]
    assert np.abs(predicted[0] - predicted[1]).max() < 0.01


@pytest.mark.parametrize(("policy", "expected"), [(POLICY, "policy"), (replace(POLICY, head="free", steps=0), "dual")])
def test_the_cheaper_mode_is_chosen_out_of_fold(
    with_policy: Path, tmp_path: Path, policy: PolicyConfig, expected: str
) -> None:
    """A policy that has learned costs less than the plug-in rule, one that has never been trained costs more."""
    data = with_policy.with_name("synthetic")
    out = train(policy_settings(data, tmp_path / "router", mode="cheaper", policy=policy))
    chosen = log_of(out, "policy selected")[-1]
    assert (min(chosen["cost_usd"]) < chosen["dual_cost_usd"]) == (expected == "policy")
    assert chosen["mode"] == expected
    router = Router.load(out)
    assert router.mode == expected
    assert set(router.certificate.paths) == {"dual", "policy"}
    tau_max = router.tau_max
    assert tau_max is not None
    assert router.route("Question: poems1 word3?", tau_max - 0.02).status == Status.FEASIBLE


def test_finished_stages_serve_another_mode(with_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same place nothing is searched or trained again, and the result is the same."""
    before = checkpoint.load(with_policy)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a finished stage ran again")

    monkeypatch.setattr(predictor, "fit_shrinkages", never)
    monkeypatch.setattr("proteus_fast.training.ppo.Trainer._one_step", never)
    again = checkpoint.load(train(policy_settings(with_policy.with_name("synthetic"), with_policy)))
    assert again.sha256 == before.sha256


def test_the_command_line_trains_a_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = str(synthetic.write_splits(tmp_path / "small", synthetic.outcome_table(300))), str(tmp_path / "router")
    words = ["train", "--data", data, "--out", out, "--mode", "policy", "--policy-steps", "1", "--seed", "2"]
    assert main([*words, "--head", "free", "--dual", "scalar", "--json"]) == 0
    shown = capsys.readouterr()
    answer = json.loads(shown.out)
    assert (answer["mode"], answer["candidates"]) == ("policy", list(synthetic.CANDIDATES))
    config = Router.load(out).checkpoint.config
    assert (config.mode, config.head) == ("policy", "free")
    knots = checkpoint.load(out).tensors["policy.knots_dual"]
    np.testing.assert_allclose(knots, np.log(2.0), atol=1e-6)
    assert main(["evaluate", out, "--data", data, "--taus", ".6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["tau"] == 0.6


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--mode", "fast"], None, "invalid choice"),
        (["--dual", "both"], None, "invalid choice"),
        (["--policy-steps", "many"], None, "invalid int"),
        (["--mode", "policy", "--policy-steps", "-1"], 2, "expected at least 0"),
        (["--policy-steps", "3"], 2, "mode: expected policy or cheaper"),
        (["--head", "free"], 2, "mode: expected policy or cheaper"),
        (["--dual", "scalar"], 2, "mode: expected policy or cheaper"),
    ],
)
def test_wrong_words_for_a_policy(
    data: Path, tmp_path: Path, words: list[str], status: int | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--data", str(data), "--out", str(tmp_path / "x"), *words]
    if status is None:
        with pytest.raises(SystemExit) as caught:
            main(command)
        assert caught.value.code == 2
    else:
        assert main(command) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
