"""The README's examples run as they stand, and what it names is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from proteus_fast import Router
from proteus_server.app import Server

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
FIRST_SCREEN_LINES = 25


def output_of(code: str, cwd: Path) -> str:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=cwd, capture_output=True, text=True,
                          check=True, timeout=60).stdout  # fmt: skip


def test_the_first_screen_is_one() -> None:
    assert README[: README.index("\n## ")].count("\n") <= FIRST_SCREEN_LINES


def test_the_first_example_routes(tmp_path: Path) -> None:
    candidate, status, floor = output_of(EXAMPLES[0], tmp_path).split()
    assert candidate in Router.load().pool.names
    assert (status, floor) == ("FEASIBLE", "0.85")


def test_the_batcher_example_routes(tmp_path: Path) -> None:
    shown = output_of(EXAMPLES[0] + EXAMPLES[1] + "print(decision.status.name)\n", tmp_path)
    assert shown.splitlines()[-1] == "FEASIBLE"


def test_the_client_example_routes(tmp_path: Path) -> None:
    with Server(Router.load(), "127.0.0.1:0").running() as address:
        shown = output_of(EXAMPLES[2].replace("127.0.0.1:50051", address), tmp_path)
    assert "FEASIBLE 0.85" in shown


def test_named_targets_and_files_are_there() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z]+)", README, re.MULTILINE)) <= targets
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).is_file(), path
