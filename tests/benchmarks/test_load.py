"""The load's client against real servers: what it counts, when it sends, and what it prints."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import load, probes, scenarios, serving
from proteus_fast import Router
from proteus_server import app, native
from proteus_server import proteus_pb2 as pb

if not native.is_built():
    pytest.skip("this build has no native data plane, and the client needs the same library", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def client() -> Path:
    """The client, built once and kept beside the virtual environment."""
    return load.build()


@pytest.fixture(scope="module")
def router() -> Router:
    return Router.load()


@pytest.fixture(scope="module")
def address(router: Router, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("s")
    with app.Server(router, f"unix:{folder}/s").running() as place:
        yield place


def test_the_contract(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--address", address, "--in-flight", "4", "--seconds", "0.2", "--input", "text", "--json"]
    assert load.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    names = {"rate", "p50_us", "p99_us", "p999_us", "errors", "decisions_per_s", "server_cpu_us_per_call"}
    assert names <= set(result)
    assert result["errors"] == 0
    assert 0 < result["p50_us"] <= result["p99_us"] <= result["p999_us"] <= result["max_us"]
    assert result["by_status"] == {"OK": result["calls"]}
    # this process serves, and works for it
    assert result["server_cpu"] > 0


@pytest.mark.parametrize("place", ["unix", "tcp"])
def test_an_open_loop_sends_what_was_asked_for(router: Router, place: str, tmp_path: Path) -> None:
    target = f"unix:{tmp_path}/s" if place == "unix" else "127.0.0.1:0"
    log = tmp_path / "samples"
    with app.Server(router, target).running() as address:
        result = load.measure(address, "embedding", rate=2000, seconds=0.5, warm_up=0.1, samples=log)
    samples = np.fromfile(log, "<i8").reshape(-1, 3)
    assert result["errors"] == 0
    assert len(samples) == result["calls"] == result["sent"]
    # 1000 expected, standard deviation 32
    assert 800 <= result["calls"] <= 1200
    when = np.sort(samples[:, 0])
    assert when[0] >= 0
    assert when[-1] < 0.5e9
    # exponential gaps: mean 500 us, as much deviation
    gaps = np.diff(when) / 1e3
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.25)


def test_quantiles_are_those_of_the_samples(address: str, tmp_path: Path) -> None:
    log = tmp_path / "samples"
    result = load.measure(address, "embedding", in_flight=8, seconds=0.3, samples=log)
    samples = np.fromfile(log, "<i8").reshape(-1, 3)
    spent_us = samples[:, 1] / 1e3
    for name, q in (("p50_us", 50), ("p99_us", 99), ("p999_us", 99.9)):
        assert result[name] == pytest.approx(np.percentile(spent_us, q, method="higher"), rel=0.02), name
    assert result["max_us"] == pytest.approx(spent_us.max(), abs=0.1)


def test_latencies_count_from_the_intended_time(router: Router, tmp_path: Path) -> None:
    """While the server is stopped calls go on to be due: a closed loop would have seen a single slow one."""
    router.save(tmp_path / "checkpoint")
    log = tmp_path / "samples"
    with serving.serving(tmp_path / "checkpoint") as server, ThreadPoolExecutor(1) as pool:
        run = pool.submit(load.measure, server.address, "embedding", rate=1000, seconds=1.2, samples=log)
        time.sleep(0.5)
        os.kill(server.pid, signal.SIGSTOP)
        time.sleep(0.4)
        os.kill(server.pid, signal.SIGCONT)
        result = run.result()
    spent_us = np.fromfile(log, "<i8").reshape(-1, 3)[:, 1] / 1e3
    assert set(result["by_status"]) <= {"OK", "RESOURCE_EXHAUSTED"}
    # some 300 of 1,200 are due more than 100 ms before the server goes on
    assert (spent_us > 100_000).sum() > 200
    assert result["p99_us"] > 250_000


def test_refusals_are_counted_by_status(router: Router, tmp_path: Path) -> None:
    options = app.Options(max_queue=1, workers=1)
    with app.Server(router, f"unix:{tmp_path}/s", options).running() as address:
        result = load.measure(address, "text", in_flight=800, connections=1, seconds=0.3)
    assert set(result["by_status"]) == {"OK", "RESOURCE_EXHAUSTED"}
    assert result["errors"] == result["by_status"]["RESOURCE_EXHAUSTED"] > 0
    assert result["error_p50_us"] > 0


def test_bad_requests_and_bad_replies_are_errors(router: Router, address: str) -> None:
    count = len(router.pool)
    bad = [pb.RouteRequest(text="q", tau=2.0).SerializeToString()]
    result = load.generate(address, bad, in_flight=1, seconds=0.1, candidates=count)
    assert set(result["by_status"]) == {"INVALID_ARGUMENT"}
    good = [pb.RouteRequest(text="q", tau=0.5).SerializeToString()]
    # a reply of one row where two were asked for
    one = [pb.RouteBatchRequest(texts=["q"], tau=[0.5]).SerializeToString()]
    result = load.generate(address, one, in_flight=1, seconds=0.1, candidates=count, method="RouteBatch", rows=2)
    assert set(result["by_status"]) == {"malformed"}
    # a choice that is no candidate
    choice = router.route("q", tau=0.5).choice
    result = load.generate(address, good, in_flight=1, seconds=0.1, candidates=max(1, choice))
    assert set(result["by_status"]) == {"malformed" if choice else "OK"}


def test_deadlines_and_cancellations(address: str) -> None:
    options: dict[str, Any] = {"rows": 1024, "in_flight": 16, "seconds": 0.2, "grace": 5.0}
    timed = load.measure(address, "text", timeout_from_us=1000, timeout_to_us=2000, **options)
    assert timed["by_status"]["DEADLINE_EXCEEDED"] > 0
    assert timed["late_decided"] == 0
    left = load.measure(address, "text", cancel_from_us=1000, cancel_to_us=2000, **options)
    assert left["by_status"]["CANCELLED"] == left["cancelled_by_client"] > 0


def test_what_cannot_be_measured_is_said(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load.main(["--address", f"unix:{tmp_path}/none", "--rate", "1", "--seconds", "0.1"]) == 2
    assert capsys.readouterr().err.startswith("load: ")
    with pytest.raises(load.NotMeasured, match="unknown argument --no-such"):
        load.generate(address, [b""], rate=1, seconds=0.1, candidates=1, no_such=1)


def test_answers_are_held_against_the_router_they_name(router: Router, address: str, tmp_path: Path) -> None:
    served = Path(tmp_path, "served")
    router.save(served)
    result = load.measure(address, "embedding", in_flight=4, seconds=0.1, answers=1)
    assert result["answers"]
    mixed, versions = probes.mixed_answers(result["answers"], [served])
    assert (mixed, versions) == (0, 1)
    wrong = [[message, choice, bits ^ 1 << 20, *rest] for message, choice, bits, *rest in result["answers"]]
    assert probes.mixed_answers(wrong, [served])[0] == result["ok"]
    unknown = [[*row[:3], "", row[4]] for row in result["answers"]]
    assert probes.mixed_answers(unknown, [served])[0] == result["ok"]


def test_a_slope_is_by_the_hour() -> None:
    assert probes.slope_per_hour([(0.0, 1.0), (1800.0, 2.0), (3600.0, 3.0)]) == pytest.approx(2.0)


def test_the_table_keeps_the_rows_of_what_did_not_run() -> None:
    check = scenarios.at_most("p50", 3.0, 2.0, "us")
    assert check.verdict == "MISSED"
    first = scenarios.written("", {"steady": [check]}, "quick")
    assert "| 7 | steady | p50 | 3 us | <= 2 us | MISSED | quick |" in first
    assert "| 8 | overload | | | | not run | |" in first
    second = scenarios.written(first, {"overload": [scenarios.none("errors", 0)]}, "full")
    assert "| 7 | steady | p50 | 3 us | <= 2 us | MISSED | quick |" in second
    assert "| 8 | overload | errors | 0 | 0 | pass | full |" in second
    assert "| 8 | overload | | | | not run | |" not in second
