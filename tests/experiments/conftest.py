"""What the tests of experiments share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from threadpoolctl import threadpool_limits

from proteus_fast.experiments.study import one_thread


@pytest.fixture(scope="module", autouse=True)
def serial() -> Iterator[None]:
    """On matrices this small a second thread only waits, for long where the cores are shared."""
    with one_thread(), threadpool_limits(1):
        yield
