"""How counts of instructions are held against the recorded ones; nothing is counted here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import instructions
from benchmarks.instructions import Entry

COMPILER = "g++ 12.2.0"
HERE = Entry("glibc 2.36", "valgrind-3.19.0", {"decide": 1000.0, "encode": 20000.0})


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Every run "measures" HERE and reads and writes the file that is returned, which holds HERE."""
    path = tmp_path / "instructions.json"
    monkeypatch.setattr(instructions, "measure", lambda _folder: (COMPILER, HERE))
    monkeypatch.setattr(instructions, "RECORDED", path)
    monkeypatch.setattr(instructions, "ROOT", tmp_path)
    instructions.write_recorded(path, COMPILER, HERE)
    return path


@pytest.mark.parametrize("expected", [1000.0, 991.0, 1010.0])
def test_a_count_within_the_band_passes(expected: float) -> None:
    (row,) = instructions.compare({"decide": expected}, {"decide": 1000.0})
    assert row.passed
    assert row.verdict == "ok"
    assert row.ratio == pytest.approx(1000.0 / expected)


@pytest.mark.parametrize(("expected", "word"), [(989.0, "MORE"), (1011.0, "FEWER")])
def test_a_count_outside_the_band_fails(expected: float, word: str) -> None:
    (row,) = instructions.compare({"decide": expected}, {"decide": 1000.0})
    assert not row.passed
    assert row.verdict.startswith(word)
    assert ("--record" in row.verdict) == (word == "FEWER")


def test_a_case_on_one_side_only_fails() -> None:
    new, gone = instructions.compare({"old": 5.0}, {"young": 7.0})
    assert (new.case, new.expected, new.got, new.passed) == ("young", None, 7.0, False)
    assert (gone.case, gone.expected, gone.got, gone.passed) == ("old", 5.0, None, False)
    assert "--record" in new.verdict
    assert "--record" in gone.verdict


def test_equal_counts_succeed(capsys: pytest.CaptureFixture[str]) -> None:
    assert instructions.main([]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("ok") == 2
    assert captured.err == "g++ 12.2.0, glibc 2.36, valgrind-3.19.0\n"


def test_the_failure_names_case_counts_and_ratio(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    instructions.write_recorded(measured, COMPILER, Entry("glibc 2.41", HERE.valgrind, {"decide": 800, "encode": 2e4}))
    assert instructions.main([]) == 1
    captured = capsys.readouterr()
    assert "decide                            800.00      1,000.00   1.2500  MORE instructions" in captured.out
    assert "recorded with glibc 2.41" in captured.err


def test_an_unknown_compiler_is_not_compared(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured.write_text(measured.read_text().replace(COMPILER, "g++ 99.1.0"))
    assert instructions.main([]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("not compared") == 2
    assert "1,000.00" in captured.out
    assert "nothing was compared" in captured.err


def test_record_replaces_this_compiler_only(measured: Path) -> None:
    other = Entry("glibc 2.41", "valgrind-3.24.0", {"decide": 900.0})
    instructions.write_recorded(measured, "g++ 14.2.0", other)
    instructions.write_recorded(measured, COMPILER, Entry("", "", {"decide": 1.0, "gone": 2.0}))
    assert instructions.main([]) == 1
    assert instructions.main(["--record"]) == 0
    assert instructions.read_recorded(measured) == {COMPILER: HERE, "g++ 14.2.0": other}
    assert instructions.main([]) == 0


def test_json_is_a_list_of_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert instructions.main(["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0] == {"case": "decide", "expected": 1000.0, "got": 1000.0, "ratio": 1.0, "verdict": "ok"}
    assert len(rows) == 2


def entry(**changes: Any) -> dict[str, Any]:
    return {COMPILER: {"libc": "", "valgrind": "", "instructions": {"decide": 1.0}, **changes}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "expected an object of compilers, got list"),
        ('{"g++ 12.2.0": 3}', "g++ 12.2.0: expected the fields"),
        (json.dumps(entry(extra=1)), "expected the fields"),
        (json.dumps(entry(instructions=[1])), "expected an object of counts, got list"),
        (json.dumps(entry(instructions={"decide": "1"})), "decide: expected a positive number, got '1'"),
        (json.dumps(entry(instructions={"decide": 0})), "decide: expected a positive number, got 0"),
        (json.dumps(entry(instructions={"decide": True})), "decide: expected a positive number, got True"),
        (json.dumps(entry(instructions={"decide": float("nan")})), "decide: expected a positive number, got nan"),
    ],
)
def test_a_malformed_file_is_named(
    measured: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    measured.write_text(content)
    assert instructions.main([]) == 2
    error = capsys.readouterr().err
    assert str(measured) in error
    assert message in error


def test_without_a_file_nothing_is_recorded(measured: Path) -> None:
    measured.unlink()
    assert instructions.read_recorded(measured) == {}


def test_the_recorded_file_is_well_formed() -> None:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "instructions.json"
    recorded = instructions.read_recorded(path)
    assert recorded
    assert len({frozenset(each.instructions) for each in recorded.values()}) == 1


def test_the_total_is_read_from_cachegrinds_file() -> None:
    head = "desc: I1 cache: 32 B\ncmd: ./instructions decide 1\n"
    assert instructions.parse_summary(f"{head}events: Ir\nfl=a.cpp\nfn=main\n1 250\n2 250\nsummary: 500\n") == 500
    with pytest.raises(instructions.NotMeasured, match="expected the lines"):
        instructions.parse_summary(f"{head}events: Ir I1mr\nfl=a.cpp\nfn=main\n1 250 1\nsummary: 250 1\n")


def test_a_failing_command_shows_its_output() -> None:
    with pytest.raises(instructions.NotMeasured, match=r"exit status 3\nwhy"):
        instructions.run(["sh", "-c", "echo why >&2; exit 3"])
    with pytest.raises(instructions.NotMeasured, match="no-such-program: not found"):
        instructions.run(["no-such-program"])
