"""The command line: shapes of its answers, exit statuses, and a whole round from data to a certified router."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proteus_fast import checkpoint
from proteus_fast.cli import main
from proteus_fast.evaluation.outcomes import concatenate, read_table
from proteus_fast.router import Router
from tests.checkpoints import tiny_checkpoint
from tests.evaluation import synthetic


def run_json(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> Any:
    assert main([*words, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_json(capsys, "plan", "--tau", ".9", "--headroom", ".02", "--delta", ".05") == {"labels": 1845}
    assert main(["plan", "--tau", ".9", "--headroom", ".02"]) == 0
    assert "labelled queries certify 0.9" in capsys.readouterr().out


def test_route(capsys: pytest.CaptureFixture[str]) -> None:
    answer = run_json(capsys, "route", "What is 17 * 23?", "--tau", ".85")
    assert {"candidate", "choice", "mu", "score", "status", "certified_floor", "tau_max", "fallbacks"} <= set(answer)
    names = Router.load().pool.names
    assert names[answer["choice"]] == answer["candidate"]
    assert (answer["status"], answer["certified_floor"]) == ("FEASIBLE", 0.85)
    assert sorted([answer["candidate"], *answer["fallbacks"]]) == sorted(names)
    only = run_json(capsys, "route", "hi", "--tau", ".8", "--available", "gemini-1.5-pro")
    assert (only["candidate"], only["status"], only["certified_floor"]) == ("gemini-1.5-pro", "UNCERTIFIED", None)
    infeasible = run_json(capsys, "route", "hi", "--tau", "1")
    assert infeasible["status"] == "INFEASIBLE"
    assert infeasible["tau_max"] < 1.0
    assert main(["route", "hi", "--tau", "1", "--strict"]) == 1
    assert "(tau_max)" in capsys.readouterr().err
    assert main(["route", "hi", "--tau", ".85"]) == 0
    assert "FEASIBLE  certified floor 0.850" in capsys.readouterr().out


def test_which_router_answers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny = str(tmp_path / "tiny")
    Router(tiny_checkpoint()).save(tiny)
    embedded = run_json(capsys, "route", "hi", "--tau", ".5")["versions"]["router"]
    monkeypatch.setenv("PROTEUS_CHECKPOINT", tiny)
    assert run_json(capsys, "route", "hi", "--tau", ".5")["candidate"].startswith("model-")
    monkeypatch.setenv("PROTEUS_CHECKPOINT", "")
    assert run_json(capsys, "route", "hi", "--tau", ".5")["versions"]["router"] == embedded
    assert run_json(capsys, "route", "hi", "--tau", ".5", "--checkpoint", tiny)["versions"]["router"] != embedded
    # an empty variable of a script names no router, and never another one
    assert main(["route", "hi", "--tau", ".5", "--checkpoint", ""]) == 2
    assert "checkpoint: expected a folder, got an empty name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice"),
        (["route", "hi"], "--tau"),
        (["route", "hi", "--tau", "high"], "invalid float"),
        (["evaluate", "--data", "x", "--taus", ".8,high"], "expected numbers separated by commas"),
        (["evaluate", "--data", "x", "--taus", "1.8"], "expected numbers in [0, 1]"),
        (["train", "--data", "x"], "--out"),
        (["plan", "--tau", ".9"], "--headroom"),
    ],
)
def test_wrong_usage_exits_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["route", "hi", "--tau", "1.5"], "tau: expected a number in [0, 1], got 1.5"),
        (["route", "hi", "--tau", "nan"], "tau: expected a number in [0, 1], got nan"),
        (["route", "hi", "--tau", ".8", "--available", "gpt-99"], "available: expected one of"),
        (["route", "hi", "--tau", ".8", "--checkpoint", "/nowhere"], "/nowhere: expected a checkpoint folder"),
        (["plan", "--tau", ".9", "--headroom", "0"], "headroom: expected"),
        (["serve"], "address: expected --address, or address in the file of --config, got none"),
        (["plan", "--tau", ".9", "--headroom", ".01", "--delta", "2"], "delta: expected"),
        (["train", "--data", "/nowhere", "--out", "/tmp/x"], "/nowhere/train.parquet: expected a Parquet file"),
        (
            ["train", "--data", "x", "--out", "/tmp/x", "--encoder", "bert"],
            "encoder: expected a directory, got nothing",
        ),
        (["evaluate", "--data", "/nowhere"], "/nowhere/test.parquet: expected a Parquet file"),
        (["evaluate", "/nowhere", "--data", "/nowhere"], "expected"),
        (["certify", "/nowhere", "--data", "/nowhere", "--out", "/tmp/x"], "expected"),
        (["serve", "--address", "nonsense"], "address: expected"),
    ],
)
def test_bad_input_exits_with_2_and_says_why(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("demo", "train", "evaluate", "route", "serve", "plan", "certify"):
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        assert f"proteus {command}" in capsys.readouterr().out


def test_from_data_to_a_certified_router(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = synthetic.write_splits(tmp_path / "synthetic", synthetic.outcome_table(1500, seed=5))
    out = str(tmp_path / "router")
    trained = run_json(
        capsys, "train", "--data", str(data), "--out", out, "--delta", ".1", "--seed", "1", "--no-refine"
    )
    assert trained["candidates"] == list(synthetic.CANDIDATES)
    assert (tmp_path / "router.training" / "curves.png").stat().st_size > 1000
    report = run_json(capsys, "evaluate", out, "--data", str(data), "--taus", ".6,.7,.99")
    assert (report["dataset"], report["split"]) == ("synthetic", "test")
    assert [row["tau"] for row in report["rows"]] == [0.6, 0.7, 0.99]
    assert report["rows"][2]["status"] == "INFEASIBLE"
    assert set(report["rows"][0]) == {
        "tau", "status", "certified_floor", "accuracy", "floor_met", "mean_cost_usd", "share", "baselines",
    }  # fmt: skip
    assert set(report["rows"][0]["baselines"]) == {
        "hull_usd", "oracle_usd", "best_fixed_usd", "knn_usd", "tfidf_ridge_usd",
    }  # fmt: skip
    assert sum(report["rows"][0]["share"].values()) == pytest.approx(1.0)
    again = str(tmp_path / "again")
    words = ("certify", out, "--data", str(data / "test.parquet"), "--out", again, "--delta", ".05")
    certified = run_json(capsys, *words)
    assert certified["n"] == certified["distinct"] == report["n"]
    first, second = checkpoint.load(out), checkpoint.load(again)
    assert second.certificate.delta == 0.05
    assert second.certificate.data_sha256 != first.certificate.data_sha256
    assert (first.certificate.paths["dual"].path.parameter == second.certificate.paths["dual"].path.parameter).all()
    # every answer wrong: nothing is certified, and that is a missed check; repeats are named
    table = synthetic.outcome_table(40, seed=1).take(np.repeat(np.arange(40), 5))
    synthetic.write_table(tmp_path / "wrong.parquet", replace(table, score=np.zeros_like(table.score)))
    words = ("certify", out, "--data", str(tmp_path / "wrong.parquet"), "--out", again)
    assert main(list(words)) == 1
    shown = capsys.readouterr()
    assert "no target is certified" in shown.out
    assert "200 queries, with their repeats, say as much as 40 distinct ones" in shown.err
    # nor do the rows that the router was trained on certify it, in whatever order, or a part of them
    train = read_table(data / "train.parquet")
    synthetic.write_table(tmp_path / "some.parquet", train.take(np.random.default_rng(0).permutation(len(train))[:-9]))
    synthetic.write_table(tmp_path / "turned.parquet", train.with_candidates(train.candidates[::-1]))
    for file in (data / "train.parquet", tmp_path / "some.parquet", tmp_path / "turned.parquet"):
        assert main(["certify", out, "--data", str(file), "--out", again]) == 2
        assert "expected queries that the router was not trained on, got" in capsys.readouterr().err
    test = read_table(data / "test.parquet")
    synthetic.write_table(tmp_path / "mixed.parquet", concatenate(test, train.take(np.arange(12))))
    assert main(["certify", out, "--data", str(tmp_path / "mixed.parquet"), "--out", again]) == 0
    assert "of the queries were among the training rows" in capsys.readouterr().err
    # a place that is taken is refused before any work
    assert main(["train", "--data", str(data), "--out", str(data)]) == 2
    assert "expected a checkpoint or an empty folder" in capsys.readouterr().err
    # the embedded router's candidates are not in this table
    assert main(["evaluate", "--data", str(data)]) == 2
    assert "expected the candidates of the router" in capsys.readouterr().err


def test_module_runs_as_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "proteus_fast", "plan", "--tau", ".9", "--headroom", ".03", "--delta", ".05", "--json"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == {"labels": 792}


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m proteus_fast route hello --tau .8 --json | true; echo ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() in ("0", "141")
    assert done.stderr == ""
    closed = subprocess.run(
        f"{sys.executable} -m proteus_fast route hello --tau .8 >&-", shell=True, cwd=tmp_path, capture_output=True,
        check=True,
    )  # fmt: skip
    assert closed.stderr == b""
