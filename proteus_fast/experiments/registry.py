"""Every experiment by its name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from proteus_fast.experiments.study import Result, Study

Experiment = Callable[[Sequence[Study], int, Callable[[], Any]], Result]

_MODULE = {
    "correlation": "policies",
    "heads": "policies",
    "cost-range": "policies",
    "extremes": "policies",
    "ablations": "policies",
    "convergence": "duals",
    "alarm": "duals",
    "dynamic": "traffic",
    "shocks": "traffic",
    "leak": "leak",
}
NAMES = tuple(_MODULE)


def experiment(name: str) -> Experiment:
    """The experiment of a name: a function of studies, number of seeds and a call for each finished run."""
    if name not in _MODULE:
        raise ValueError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
    module = importlib.import_module(f"proteus_fast.experiments.{_MODULE[name]}")
    found: Experiment = getattr(module, name.replace("-", "_"))
    return found
