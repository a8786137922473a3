"""Every kernel compiles for both targets within its limits, and a limit that is too low is seen.

In processes of their own: here Triton interprets, there it compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {"kernel", "target", "registers", "stack_bytes", "spills", "shared_bytes", "loads_128", "hgmma"}


def resources(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "resources.py"), *arguments]
    # the compiler must not be told to interpret
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_every_kernel_is_within_its_limits() -> None:
    done = resources("--json")
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    assert all(set(row) == FIELDS for row in rows)
    hopper = {row["kernel"]: row for row in rows if row["target"] == "sm_90"}
    for row in hopper.values():
        assert row["spills"] == 0, row
        # a frame of 8 bytes that nothing reads or writes is what the assembler leaves of some
        assert row["stack_bytes"] <= 8, row
    assert len(rows) == 2 * len(hopper)
    assert all(row["hgmma"] > 0 for kernel, row in hopper.items() if kernel.endswith("in bf16"))
    assert all(row["loads_128"] > 0 for kernel, row in hopper.items() if kernel != "sample_beta")


def test_a_limit_that_is_passed_is_seen(tmp_path: Path) -> None:
    every = json.loads((ROOT / "benchmarks" / "results" / "resources.json").read_text())
    for release in every.values():
        release["sample_beta sm_90"] |= {"registers": 20, "loads_128": 4}
        del release["sample_beta sm_80"]
    limits = tmp_path / "limits.json"
    limits.write_text(json.dumps(every))
    done = resources("-k", "sample_beta", "--limits", str(limits))
    assert done.returncode == 1
    assert "sample_beta sm_90: registers: expected at most 20, got " in done.stderr
    assert "sample_beta sm_90: loads_128: expected at least 4, got 0" in done.stderr
    assert "sample_beta sm_80: expected limits of this release, got none" in done.stderr
    assert resources("-k", "sample_beta").returncode == 0


def test_a_part_of_no_name_is_wrong_usage() -> None:
    done = resources("-k", "nothing")
    assert done.returncode == 2
    assert "-k: expected a part of a kernel's name, got 'nothing'" in done.stderr
