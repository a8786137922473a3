"""Benchmarks and load, from a checkout. `python -m benchmarks.load` puts the checkout first on the path: here it goes
to the end, so that the installed package is measured and not the folder of the same name, which has no core."""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_here = [entry for entry in sys.path if Path(entry or ".").resolve() == _ROOT]
if _here:
    sys.path[:] = [entry for entry in sys.path if entry not in _here] + [str(_ROOT)]
