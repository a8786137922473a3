"""Route each query to the cheapest language model that keeps an accuracy target.

``route_batch(tensor, tau)`` decides for a batch of embeddings; ``Router`` holds everything else. Names are loaded when
they are first used, so that importing this package stays quick.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proteus_fast._core import QueueFullError
    from proteus_fast.answers import Decision, Explanation, Feasibility, RouteBatch
    from proteus_fast.batcher import Batcher
    from proteus_fast.certificate import Certificate, Status, plan
    from proteus_fast.evaluation.report import Report, evaluate
    from proteus_fast.pool import Candidate, Pool
    from proteus_fast.router import Router, current, route_batch, use
    from proteus_fast.training.train import TrainConfig, train

__version__ = "0.1.0"

_HOMES = {
    "QueueFullError": "_core",
    "Batcher": "batcher",
    "Certificate": "certificate",
    "Status": "certificate",
    "plan": "certificate",
    "Report": "evaluation.report",
    "evaluate": "evaluation.report",
    "Candidate": "pool",
    "Pool": "pool",
    "Decision": "answers",
    "Explanation": "answers",
    "Feasibility": "answers",
    "RouteBatch": "answers",
    "Router": "router",
    "current": "router",
    "route_batch": "router",
    "use": "router",
    "TrainConfig": "training.train",
    "train": "training.train",
}

__all__ = [
    "Batcher",
    "Candidate",
    "Certificate",
    "Decision",
    "Explanation",
    "Feasibility",
    "Pool",
    "QueueFullError",
    "RouteBatch",
    "Router",
    "Status",
    "__version__",
    "current",
    "plan",
    "route_batch",
    "use",
]
# where they cannot be imported, `from proteus_fast import *` does without them
if all(map(find_spec, ("torch", "scipy", "sklearn", "pyarrow", "tqdm", "matplotlib"))):
    __all__ += ["Report", "TrainConfig", "evaluate", "train"]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f"{__name__}.{home}"), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == __name__:
            raise
        missing = f"{name}: expected the package {error.name}: install proteus-fast[train]"
        raise ModuleNotFoundError(missing, name=error.name) from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
