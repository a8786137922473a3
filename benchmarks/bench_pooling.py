"""Mean over tokens on a CPU, in the kernels' order, beside torch: `pytest benchmarks/bench_pooling.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from proteus_fast import _core
from proteus_kernels import reference


def einsum(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weight = mask.to(hidden.dtype)
    return torch.einsum("btd,bt->bd", hidden, weight) / weight.sum(dim=1, keepdim=True).clamp_min(1)


FORMS: dict[str, Callable[..., Any]] = {
    "proteus_fast": _core.masked_mean,
    "torch_eager": einsum,
    "torch_compile": torch.compile(einsum, dynamic=False),
    "reference": reference.masked_mean_ref,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 32])
def test_masked_mean(benchmark: Any, rows: int, form: str) -> None:
    torch.set_num_threads(1)
    benchmark.group = f"masked mean {rows} x 64 x 384"
    random = np.random.default_rng(1)
    hidden = random.standard_normal((rows, 64, 384)).astype(np.float32)
    mask = random.random((rows, 64)) < 0.8
    expected = reference.masked_mean_ref(torch.from_numpy(hidden).double(), torch.from_numpy(mask)).numpy()
    given = (hidden, mask) if form == "proteus_fast" else (torch.from_numpy(hidden), torch.from_numpy(mask))
    assert np.abs(np.asarray(FORMS[form](*given)) - expected).max() < 1e-5
    benchmark(FORMS[form], *given)
