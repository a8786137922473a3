"""Instructions of the native core, counted by cachegrind and held against the recorded ones.

    python benchmarks/instructions.py [--build DIR] [--record] [--json]

Builds benchmarks/native/instructions.cpp with the flags of the wheel and runs each case with one and with two
repetitions: the difference is the work without its set-up. Inputs are fixed, so that the counts repeat to the digit.
benchmarks/results/instructions.json holds a count per item (row, text or sample) for each compiler; one that is more
than 1 % off, up or down, fails. Exit status: 0 all within, or a compiler without recorded counts; 1 a count outside;
2 nothing was measured. --record writes the counts of this compiler.

Counted is the code for AVX2, also where the processor has AVX-512, which valgrind lacks. A processor without AVX2 is
an error. What can still differ between machines with one compiler:

- the C library: exp, log, log1p, pow, memcpy and memset are its own, so another release may take another number. It
  picks among its versions of them by CPUID and cache sizes; valgrind answers for a processor of its own making, the
  same on every host with AVX2, and GLIBC_TUNABLES is not passed on. The release is recorded and printed.
- the headers of the C++ library, where it is not the compiler's own.
- the length of the environment moves the stack, and with it the alignment of copies: the program gets an empty one,
  and is started as ./instructions with arguments of one length.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORDED = ROOT / "benchmarks" / "results" / "instructions.json"
BAND = 0.01
RECORD = "record it with --record"


@dataclass(frozen=True)
class Entry:
    """What is recorded for one compiler: with which C library and valgrind, and instructions per item by case."""

    libc: str
    valgrind: str
    instructions: dict[str, float]


@dataclass(frozen=True)
class Row:
    """One case; ``expected`` is None where nothing is recorded, ``got`` where the case is gone."""

    case: str
    expected: float | None
    got: float | None
    ratio: float | None
    verdict: str

    @property
    def passed(self) -> bool:
        return self.verdict in {"ok", "not compared"}


class NotMeasured(Exception):
    """Nothing could be counted; the text says why."""


def compare(recorded: Mapping[str, float] | None, got: Mapping[str, float]) -> list[Row]:
    """Hold counts against the recorded ones, None for a compiler without any."""
    if recorded is None:
        return [Row(case, None, count, None, "not compared") for case, count in got.items()]
    rows = []
    for case, count in got.items():
        expected = recorded.get(case)
        if expected is None:
            rows.append(Row(case, None, count, None, f"new: {RECORD}"))
            continue
        ratio = count / expected
        verdict = "ok"
        if ratio > 1 + BAND:
            verdict = "MORE instructions"
        elif ratio < 1 - BAND:
            verdict = "FEWER instructions: record the improvement with --record"
        rows.append(Row(case, expected, count, ratio, verdict))
    gone = [case for case in recorded if case not in got]
    return rows + [Row(case, recorded[case], None, None, f"gone: {RECORD}") for case in gone]


def read_recorded(path: Path) -> dict[str, Entry]:
    """Entries by compiler, none without a file; ValueError where the file is not what --record writes."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object of compilers, got {type(content).__name__}")
    return {compiler: _parse_entry(f"{path}: {compiler}", entry) for compiler, entry in content.items()}


def _parse_entry(where: str, entry: Any) -> Entry:
    fields = {"libc", "valgrind", "instructions"}
    if not isinstance(entry, dict) or set(entry) != fields:
        got = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f"{where}: expected the fields {sorted(fields)}, got {got}")
    counts = entry["instructions"]
    if not isinstance(counts, dict):
        raise ValueError(f"{where}: instructions: expected an object of counts, got {type(counts).__name__}")
    for case, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int | float) or not count > 0:
            raise ValueError(f"{where}: {case}: expected a positive number, got {count!r}")
    return Entry(str(entry["libc"]), str(entry["valgrind"]), counts)


def write_recorded(path: Path, compiler: str, entry: Entry) -> None:
    entries = {**read_recorded(path), compiler: entry}
    content = {name: asdict(each) for name, each in sorted(entries.items())}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def run(command: Sequence[str | Path], cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Standard output of a command; NotMeasured with all of its output where it fails."""
    try:
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise NotMeasured(f"{command[0]}: not found") from error
    if done.returncode:
        called = " ".join(map(str, command))
        raise NotMeasured(f"{called}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def build(folder: Path) -> Path:
    """Build the program in the folder, which may hold an earlier build."""
    # flags of the caller's environment would make another program
    environment = {name: value for name, value in os.environ.items() if name not in {"CPPFLAGS", "CXXFLAGS", "LDFLAGS"}}
    # cmake and ninja come along with pip
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    cmake = shutil.which("cmake", path=environment["PATH"]) or "cmake"
    options = ["-DPROTEUS_PYTHON=OFF", "-DPROTEUS_BENCHMARKS=ON", "-DPROTEUS_SIMD_BYTES=32"]
    run([cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", *options], env=environment)
    parallel = str(os.cpu_count() or 1)
    run([cmake, "--build", folder, "--target", "instructions", "--parallel", parallel], env=environment)
    return folder / "instructions"


def count(valgrind: str, program: Path, case: str, repetitions: int, scratch: Path) -> int:
    """Instructions of the whole program."""
    out = scratch / f"{case}.{repetitions}"
    # also without the caller's ~/.valgrindrc and $VALGRIND_OPTS
    options = ["--tool=cachegrind", "--command-line-only=yes", "--cache-sim=no", f"--cachegrind-out-file={out}"]
    run([valgrind, *options, "./instructions", case, str(repetitions)], cwd=program.parent, env={"LC_ALL": "C"})
    return parse_summary(out.read_text(encoding="utf-8"))


def parse_summary(text: str) -> int:
    """Total of a file that cachegrind has written with instructions as its only event."""
    found = re.search(r"^events: Ir\n(?:.*\n)*summary: (\d+)$", text, re.MULTILINE)
    if found is None:
        raise NotMeasured("cachegrind's file: expected the lines `events: Ir` and `summary: N`, got neither or others")
    return int(found[1])


def measure(folder: Path) -> tuple[str, Entry]:
    """Compiler and counts."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise NotMeasured("valgrind: not found; on Debian: sudo apt-get install -y valgrind")
    program = build(folder)
    compiler, libc, *cases = run([program]).splitlines()
    counts = {}
    with tempfile.TemporaryDirectory() as scratch:
        for line in cases:
            case, items = line.split()
            once, twice = (count(valgrind, program, case, repetitions, Path(scratch)) for repetitions in (1, 2))
            counts[case] = round((twice - once) / int(items), 2)
    return compiler, Entry(libc, run([valgrind, "--version"]).strip(), counts)


def table(rows: Sequence[Row]) -> str:
    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [f"{'case':<26}{'expected':>14}{'got':>14}{'ratio':>9}  instructions per item"]
    lines += [
        f"{row.case:<26}{cell(row.expected, ',.2f'):>14}{cell(row.got, ',.2f'):>14}{cell(row.ratio, '.4f'):>9}  "
        f"{row.verdict}"
        for row in rows
    ]
    return "\n".join(lines)


def describe(compiler: str, here: Entry, recorded: Entry | None) -> str:
    """What was compared with what, in a line."""
    text = f"{compiler}, {here.libc}, {here.valgrind}"
    if recorded is None:
        return f"{text}: nothing was compared, no counts are recorded for this compiler; --record adds them"
    if (recorded.libc, recorded.valgrind) == (here.libc, here.valgrind):
        return text
    return f"{text}; recorded with {recorded.libc}, {recorded.valgrind}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--build", type=Path, metavar="DIR", help="build folder, kept; a temporary one without")
    parser.add_argument("--record", action="store_true", help="write the counts of this compiler")
    parser.add_argument("--json", action="store_true", help="print a list of cases")
    arguments = parser.parse_args(argv)
    try:
        recorded = read_recorded(RECORDED)
        with tempfile.TemporaryDirectory() as scratch:
            compiler, entry = measure((arguments.build or Path(scratch)).resolve())
    except (NotMeasured, ValueError) as error:
        print(f"instructions: {error}", file=sys.stderr)
        return 2
    known = recorded.get(compiler)
    rows = compare(known.instructions if known else None, entry.instructions)
    print(json.dumps([asdict(row) for row in rows], indent=1) if arguments.json else table(rows))
    print(describe(compiler, entry, known), file=sys.stderr)
    if arguments.record:
        write_recorded(RECORDED, compiler, entry)
        print(f"recorded in {RECORDED.relative_to(ROOT)}", file=sys.stderr)
        return 0
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
