"""Commands that tests start."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


def run(command: list[str], folder: Path) -> tuple[str, str]:
    """Standard output and error of a command that must succeed within five minutes."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            shown, errors = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            # asked to leave, the launcher takes its processes with it
            process.terminate()
            shown, errors = process.communicate()
            pytest.fail(f"expected an end within 300 s, got {errors[-3000:]}")
    assert process.returncode == 0, errors[-3000:]
    return shown, errors
