"""Makes the folder benchmarks/ of the checkout importable, without the checkout itself on the path."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

if "benchmarks" not in sys.modules:
    package = ModuleType("benchmarks")
    package.__path__ = [str(Path(__file__).resolve().parents[2] / "benchmarks")]
    sys.modules["benchmarks"] = package
