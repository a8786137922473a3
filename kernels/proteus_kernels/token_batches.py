"""Texts of a batch by their lengths in tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

TOKEN_BUDGET = 16_384
"""Padded tokens of one batch on a GPU."""


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Rows in batches of similar length: at most ``budget`` padded tokens each, or one row."""
    order = [row for row in np.argsort(lengths, kind="stable").tolist() if lengths[row]]
    batch: list[int] = []
    for row in order:
        if batch and (len(batch) + 1) * lengths[row] > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
