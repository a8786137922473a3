"""The mean over tokens: by value, by the order in which it adds, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from proteus_fast import _core
from proteus_kernels import reference


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 17, 79), (2, 64, 768), (4, 9, 1024), (2, 8, 16), (5, 40, 33)], ids=str
)
def test_the_mean_is_the_references(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(1)
    hidden = rng.standard_normal(shape).astype(np.float32)
    mask = rng.random(shape[:2]) < 0.7
    mask[0] = False
    hidden[~mask] = np.nan
    expected = reference.masked_mean_ref(torch.from_numpy(hidden).double(), torch.from_numpy(mask)).numpy()
    pooled = _core.masked_mean(hidden, mask)
    assert pooled.dtype == np.float32
    np.testing.assert_allclose(pooled, expected, rtol=0, atol=1e-6)
    assert not pooled[0].any()


def test_a_row_does_not_depend_on_its_padding() -> None:
    rng = np.random.default_rng(2)
    hidden = rng.standard_normal((1, 20, 50)).astype(np.float32)
    alone = _core.masked_mean(hidden[:, :13].copy(), np.ones((1, 13), bool))
    padded = _core.masked_mean(hidden, np.arange(20)[None] < 13)
    np.testing.assert_array_equal(alone, padded)


def test_empty_arrays() -> None:
    assert _core.masked_mean(np.zeros((0, 3, 4), np.float32), np.zeros((0, 3), bool)).shape == (0, 4)
    assert not _core.masked_mean(np.zeros((2, 0, 4), np.float32), np.zeros((2, 0), bool)).any()


@pytest.mark.parametrize(
    ("hidden", "mask", "error", "text"),
    [
        (np.zeros((2, 3, 4)), np.ones((2, 3), bool), TypeError, "hidden: expected a C-contiguous float32 array"),
        (np.zeros((2, 3), np.float32), np.ones((2, 3), bool), ValueError, r"hidden: expected shape \(B, T, D\)"),
        (
            np.zeros((2, 3, 4), np.float32),
            np.ones((3, 2), bool),
            ValueError,
            r"mask: expected shape \(2, 3\), got \(3, 2\)",
        ),
        (np.zeros((2, 3, 4), np.float32), np.ones((2, 3)), TypeError, "mask: expected a C-contiguous bool array"),
    ],
)
def test_wrong_arguments(hidden: Any, mask: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{text}"):
        _core.masked_mean(hidden, mask)
