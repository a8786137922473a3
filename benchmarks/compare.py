"""The CPU benchmarks of two git revisions, side by side on this machine.

    python benchmarks/compare.py BASE HEAD [-k EXPRESSION] [--pairs 5] [--rounds N] [--limit 1.15] [--json]

A revision is anything that git knows, or `.` for the working tree. Each is built and installed into an environment of
its own, which takes every other package from the interpreter that runs this. Then the benchmarks/bench_*.py of each,
as it defines them, run in turn, base, head, base, head ..., so that a slow minute of the machine meets both. A run
counts with the minimum of each benchmark. Printed are the medians of these over the runs, the median of the ratios
head / base of the pairs, and their spread.

Exit status: 1 where the median ratio of a benchmark is above --limit and even its smallest ratio is above 1 + half of
that excess, so that noise alone does not fail; 2 where nothing can be said, because a revision is unknown, does not
build or has a benchmark that fails, with the output of what failed. A benchmark of one revision only is named.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKING_TREE = "."
NO_TESTS_COLLECTED = 5
PTH = "packages_of_the_running_interpreter.pth"

Run = Mapping[str, float]  # minimum in microseconds by benchmark


@dataclass(frozen=True)
class Comparison:
    """One benchmark in both revisions; ratios are head / base, of the pairs."""

    benchmark: str
    base_us: float
    head_us: float
    ratio: float
    ratio_min: float
    ratio_max: float
    slower: bool


class NothingToCompare(Exception):
    """No speed can be reported; the text says why."""


def compare(base: Sequence[Run], head: Sequence[Run], limit: float) -> list[Comparison]:
    """Compare the benchmarks that both revisions have. Run i of both is a pair; the limit is above 1."""
    rows = []
    for name in base[0]:
        if not all(name in run for run in (*base, *head)):
            continue
        ratios = [ours[name] / theirs[name] for theirs, ours in zip(base, head, strict=True)]
        median = statistics.median(ratios)
        rows.append(
            Comparison(
                benchmark=name,
                base_us=statistics.median(run[name] for run in base),
                head_us=statistics.median(run[name] for run in head),
                ratio=median,
                ratio_min=min(ratios),
                ratio_max=max(ratios),
                slower=median > limit and min(ratios) > 1 + (limit - 1) / 2,
            )
        )
    return rows


def table(rows: Sequence[Comparison], limit: float) -> str:
    width = max(len(row.benchmark) for row in rows) + 2
    lines = [f"{'benchmark':<{width}}{'base us':>12}{'head us':>12}{'ratio':>8}  min..max"]
    for row in rows:
        verdict = f"  SLOWER than {limit:g}" if row.slower else ""
        lines.append(
            f"{row.benchmark:<{width}}{row.base_us:>12,.2f}{row.head_us:>12,.2f}{row.ratio:>8.3f}  "
            f"{row.ratio_min:.3f}..{row.ratio_max:.3f}{verdict}"
        )
    return "\n".join(lines)


def execute(
    what: str,
    command: Sequence[str | Path],
    cwd: Path,
    env: Mapping[str, str] | None = None,
    accept: Sequence[int] = (),
) -> str:
    """Standard output of a command; NothingToCompare with all of its output where it fails."""
    try:
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise NothingToCompare(f"{what}: {command[0]}: not found") from error
    if done.returncode not in {0, *accept}:
        raise NothingToCompare(f"{what}: exit status {done.returncode}\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout


def resolve(argument: str, revision: str) -> str:
    """Commit of a revision; the working tree stays what it is."""
    if revision == WORKING_TREE:
        return revision
    command = ["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"]
    commit = execute(argument, command, ROOT, accept=[1, 128]).strip()
    if not commit:
        raise NothingToCompare(f"{argument}: expected a git revision or ., got {revision}")
    return commit


def copy_sources(commit: str, folder: Path) -> None:
    """The files of a commit, or those of the working tree that git does not ignore."""
    folder.mkdir()
    if commit != WORKING_TREE:
        archive = folder.with_suffix(".zip")
        execute("git archive", ["git", "archive", "--format=zip", f"--output={archive}", commit], ROOT)
        shutil.unpack_archive(archive, folder)
        return
    names = execute("git ls-files", ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT)
    for name in names.split("\0"):
        # a file that was removed is still listed until that is committed
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def install(name: str, sources: Path, folder: Path) -> Path:
    """Build the sources and install them into a new environment; its interpreter."""
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin" / "python"
    find = "import sysconfig; print(sysconfig.get_path('platlib'))"
    site = Path(execute(f"{name}: environment", [python, "-I", "-c", find], sources).strip())
    # a plain path comes behind the environment's own, and no .pth file of that folder runs: an editable install of the
    # package there is not seen
    others = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
    (site / PTH).write_text("\n".join(others) + "\n", encoding="utf-8")
    # cmake and ninja come along with pip
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    parallel = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    environment = {**os.environ, "PATH": search, "CMAKE_BUILD_PARALLEL_LEVEL": parallel}
    options = ["--no-deps", "--no-build-isolation", "--no-compile", "--disable-pip-version-check"]
    pip: list[str | Path] = [sys.executable, "-m", "pip", "install", "-q", *options, "--target", site, sources]
    execute(f"{name}: installation", pip, folder, environment)
    where = "import proteus_fast; print(proteus_fast.__file__)"
    found = execute(f"{name}: import", [python, "-I", "-c", where], folder).strip()
    if not Path(found).is_relative_to(site):
        raise NothingToCompare(f"{name}: expected proteus_fast below {site}, got {found}")
    return python


def run_benchmarks(name: str, python: Path, sources: Path, keyword: str | None, rounds: int | None) -> Run:
    """Run the benchmarks of a revision once."""
    files = sorted(str(path.relative_to(sources)) for path in (sources / "benchmarks").glob("bench_*.py"))
    if not files:
        return {}
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.json")
        # isolated: the folder with the sources would hide the package that is installed
        command: list[str | Path] = [python, "-I", "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
        # else a failure is hidden by a warning, which is an error here, that nothing was measured
        command += [f"--benchmark-json={report}", "-W", "ignore::pytest_benchmark.logger.PytestBenchmarkWarning"]
        if keyword is not None:
            command += ["-k", keyword]
        if rounds is not None:
            command += [f"--benchmark-min-rounds={rounds}", "--benchmark-max-time=0.000001"]
        hidden = {"PROTEUS_CHECKPOINT", "PYTEST_ADDOPTS"}
        environment = {key: value for key, value in os.environ.items() if key not in hidden}
        # threads of BLAS that wait for each other on a busy machine would be most of what is measured
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        execute(f"{name}: benchmarks", command, sources, environment, accept=[NO_TESTS_COLLECTED])
        content = report.read_text(encoding="utf-8") if report.is_file() else ""
    return read_report(content)


def read_report(content: str) -> Run:
    """Minimum in microseconds by benchmark of a file of pytest-benchmark; empty where it measured nothing."""
    benchmarks = json.loads(content)["benchmarks"] if content else []
    return {each["fullname"].removeprefix("benchmarks/"): 1e6 * each["stats"]["min"] for each in benchmarks}


def measure(arguments: argparse.Namespace) -> tuple[list[Run], list[Run]]:
    """The runs of base and head."""
    commits = {name: resolve(name.upper(), getattr(arguments, name)) for name in ("base", "head")}
    runs: dict[str, list[Run]] = {name: [] for name in commits}
    with tempfile.TemporaryDirectory() as scratch:
        pythons = {}
        for name, commit in commits.items():
            print(f"{name}: building {commit[:12]}", file=sys.stderr)
            copy_sources(commit, Path(scratch, name))
            pythons[name] = install(name, Path(scratch, name), Path(scratch, f"{name}-environment"))
        for pair in range(arguments.pairs):
            for name, python in pythons.items():
                print(f"{name}: run {pair + 1} of {arguments.pairs}", file=sys.stderr)
                sources = Path(scratch, name)
                runs[name].append(run_benchmarks(name, python, sources, arguments.keyword, arguments.rounds))
    return runs["base"], runs["head"]


def describe_machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("base", metavar="BASE", help="revision to compare with")
    parser.add_argument("head", metavar="HEAD", help="revision to judge; . is the working tree")
    parser.add_argument("-k", dest="keyword", metavar="EXPRESSION", help="only the benchmarks that pytest -k selects")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each revision (5)")
    parser.add_argument("--rounds", type=int, help="rounds of each benchmark in a run; a second of them without")
    parser.add_argument("--limit", type=float, default=1.15, help="largest median ratio head / base that passes (1.15)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    for name, least in (("pairs", 1), ("rounds", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            parser.error(f"--{name}: expected at least {least}, got {value}")
    if not arguments.limit > 1:
        parser.error(f"--limit: expected more than 1, got {arguments.limit:g}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        base, head = measure(arguments)
        rows = compare(base, head, arguments.limit)
        if not rows:
            raise NothingToCompare("benchmarks: expected at least one of both revisions, got none")
    except NothingToCompare as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    machine = describe_machine()
    base_only = [name for name in base[0] if name not in head[0]]
    head_only = [name for name in head[0] if name not in base[0]]
    if arguments.json:
        facts = {
            "base": arguments.base, "head": arguments.head, "machine": machine, "pairs": arguments.pairs,
            "limit": arguments.limit, "benchmarks": [asdict(row) for row in rows],
            "base_only": base_only, "head_only": head_only,
        }  # fmt: skip
        print(json.dumps(facts, indent=1))
    else:
        print(f"{arguments.base} -> {arguments.head}, {arguments.pairs} pairs; {machine}\n")
        print(table(rows, arguments.limit))
        for only, revision in ((base_only, arguments.base), (head_only, arguments.head)):
            for name in only:
                print(f"only in {revision}, not compared: {name}")
    return 1 if any(row.slower for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
