"""`route_batch` on a CPU beside torch eager, torch.compile, the reference and NumPy: D = 256, K = 11.

`pytest benchmarks/bench_decide.py`: a group is one batch size in one mode, answers are compared before a time counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import workload
from proteus_fast.router import Router

FORMS: dict[str, Callable[[Router, str], Callable[[Any], Any]]] = {
    "torch_eager": workload.torch_eager,
    "torch_compile": workload.torch_compiled,
    "reference": workload.reference_form,
    "numpy": workload.numpy_plain,
}

MINIMA: dict[tuple[str, int, str], float] = {}


@pytest.fixture(scope="module")
def router() -> Router:
    torch.set_num_threads(1)
    return workload.build_router()


@pytest.mark.parametrize("rows", [1, 256])
@pytest.mark.parametrize("mode", ["dual", "policy"])
@pytest.mark.parametrize("form", ["proteus_fast", *FORMS])
def test_decide(benchmark: Any, router: Router, mode: Any, rows: int, form: str) -> None:
    benchmark.group = f"decide {mode} B={rows}"
    x = workload.embeddings(rows)
    # every form of the dual mode serves one vertex: the step's code has no share at this id
    ids = np.zeros(rows, np.uint64)
    expected = router.route_batch(x, workload.TAU, mode=mode, ids=ids)
    decide: Callable[[Any], Any]
    if form == "proteus_fast":
        decide = lambda rows: router.route_batch(rows, workload.TAU, mode=mode, ids=ids)  # noqa: E731
    else:
        decide = FORMS[form](router, mode)
    argument: Any = x if form in ("proteus_fast", "numpy") else torch.from_numpy(x)
    choice, mu, score = (np.asarray(part) for part in decide(argument))
    assert np.abs(mu - expected.mu).max() < 1e-5
    assert np.abs(score - expected.score).max() < 1e-5
    assert (choice == expected.choice).mean() > 0.99
    benchmark(decide, argument)
    if benchmark.stats is not None:
        MINIMA[mode, rows, form] = benchmark.stats.stats.min


def test_one_row_is_eight_times_as_fast_as_torch_eager() -> None:
    """The bar is a ratio within this run: minima of the policy's decision for one row."""
    pair = [MINIMA.get(("policy", 1, form)) for form in ("torch_eager", "proteus_fast")]
    if None in pair:
        pytest.skip("needs both forms timed in this run")
    eager, ours = pair
    assert eager / ours >= 8.0
