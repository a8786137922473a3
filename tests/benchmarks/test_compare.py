"""What two sets of runs are judged to be; nothing is built or measured here."""

from __future__ import annotations

import argparse
import json
import sys

import pytest

from benchmarks import compare

LIMIT = 1.15


def runs(*minima_us: float, name: str = "decide") -> list[dict[str, float]]:
    return [{name: minimum} for minimum in minima_us]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, float]]]:
    """The runs that main is given instead of measuring."""
    given = {"base": runs(10.0, 10.0, 10.0), "head": runs(10.0, 10.0, 10.0)}
    monkeypatch.setattr(compare, "measure", lambda _arguments: (given["base"], given["head"]))
    return given


def test_medians_and_spread_are_of_the_pairs() -> None:
    (row,) = compare.compare(runs(10.0, 20.0, 40.0), runs(11.0, 20.0, 60.0), LIMIT)
    assert (row.benchmark, row.base_us, row.head_us) == ("decide", 20.0, 20.0)
    assert row.ratio == pytest.approx(1.1)
    assert (row.ratio_min, row.ratio_max) == (1.0, 1.5)
    assert not row.slower


@pytest.mark.parametrize(
    ("head", "slower"),
    [
        ((11.4, 11.4, 11.4), False),  # below the limit
        ((11.5, 11.5, 11.5), False),  # at the limit
        ((11.6, 11.6, 11.6), True),
        ((10.7, 12.0, 12.0), False),  # one pair below half of the excess: noise could have done that
        ((10.8, 12.0, 12.0), True),
        ((10.8, 11.0, 90.0), False),  # one bad run
        ((5.0, 5.0, 5.0), False),
    ],
)
def test_slower_needs_the_median_and_the_whole_spread(head: tuple[float, ...], slower: bool) -> None:
    (row,) = compare.compare(runs(10.0, 10.0, 10.0), runs(*head), LIMIT)
    assert row.slower == slower


def test_the_limit_is_the_callers() -> None:
    base, head = runs(10.0, 10.0), runs(12.0, 12.0)
    assert compare.compare(base, head, 1.19)[0].slower
    assert not compare.compare(base, head, 1.21)[0].slower


def test_benchmarks_of_one_revision_are_named(
    measured: dict[str, list[dict[str, float]]], capsys: pytest.CaptureFixture[str]
) -> None:
    measured["base"] = [{**run, "old": 1.0} for run in measured["base"]]
    measured["head"] = [{**run, "young": 1.0} for run in measured["head"]]
    assert compare.main(["v1", "."]) == 0
    out = capsys.readouterr().out
    assert "only in v1, not compared: old" in out
    assert "only in ., not compared: young" in out
    assert compare.main(["v1", ".", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["base_only"], facts["head_only"]) == (["old"], ["young"])
    assert [row["benchmark"] for row in facts["benchmarks"]] == ["decide"]


def test_a_slower_benchmark_fails(
    measured: dict[str, list[dict[str, float]]], capsys: pytest.CaptureFixture[str]
) -> None:
    measured["head"] = runs(13.0, 12.0, 14.0)
    assert compare.main(["v1", "v2"]) == 1
    out = capsys.readouterr().out
    assert "v1 -> v2, 5 pairs" in out
    assert out.splitlines()[-1].split() == [
        "decide",
        "10.00",
        "13.00",
        "1.300",
        "1.200..1.400",
        "SLOWER",
        "than",
        "1.15",
    ]
    assert compare.main(["v1", "v2", "--limit", "1.5"]) == 0


def test_nothing_in_common_is_an_error(
    measured: dict[str, list[dict[str, float]]], capsys: pytest.CaptureFixture[str]
) -> None:
    measured["head"] = [{}, {}, {}]
    assert compare.main(["v1", "v2"]) == 2
    assert "expected at least one of both revisions, got none" in capsys.readouterr().err


def test_an_unknown_revision_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["no-such-revision", "."]) == 2
    assert "BASE: expected a git revision or ., got no-such-revision" in capsys.readouterr().err
    assert compare.main([".", "no-such-head"]) == 2
    assert "HEAD: expected a git revision or ., got no-such-head" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--pairs=0", "--pairs: expected at least 1, got 0"),
        ("--rounds=0", "--rounds: expected at least 1, got 0"),
        ("--limit=1", "--limit: expected more than 1, got 1"),
        ("--limit=nan", "--limit: expected more than 1, got nan"),
    ],
)
def test_options_out_of_range_are_wrong_usage(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        compare.main(["v1", "v2", option])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_red_benchmark_shows_its_output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_arguments: argparse.Namespace) -> None:
        compare.execute(
            "head: benchmarks", [sys.executable, "-c", "print('E assert 1 == 2'); raise SystemExit(1)"], compare.ROOT
        )

    monkeypatch.setattr(compare, "measure", fail)
    assert compare.main(["v1", "v2"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "compare: head: benchmarks: exit status 1\nE assert 1 == 2\n"
    assert captured.out == ""


def test_a_report_is_read_in_microseconds() -> None:
    content = json.dumps({"benchmarks": [{"fullname": "benchmarks/bench_a.py::test_a[1]", "stats": {"min": 2e-6}}]})
    assert compare.read_report(content) == {"bench_a.py::test_a[1]": pytest.approx(2.0)}
    assert compare.read_report("") == {}
