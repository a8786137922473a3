"""A changed snapshot decides as calls with its prices and candidates do; counts go on where they are shared."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from proteus_fast import Status, _core
from tests.core.routers import random_router

K = 5
ROUTER = random_router(np.random.default_rng(3), dim=12, width=0, candidates=K, hidden=8)
SNAPSHOT = ROUTER.build()
X = np.random.default_rng(4).standard_normal((200, 12)).astype(np.float32)
TAU = np.random.default_rng(5).random(200)
PRICES = np.array([0.3, 0.0, 7.0, 0.01, 1.5], np.float32)
MODES: Any = ["dual", "policy"]


def assert_equal(mine: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_prices_as_a_call_s_own(mode: Any) -> None:
    changed = SNAPSHOT.changed(price_usd=PRICES, certified=False, version=9)
    assert changed.version == 9
    assert_equal(changed.scores(X, TAU, mode), SNAPSHOT.scores(X, TAU, mode, price_usd=PRICES))
    assert set(changed.route(X, TAU, mode)[3].tolist()) == {Status.UNCERTIFIED}
    # the first is as it was
    assert SNAPSHOT.version == 0


@pytest.mark.parametrize("mode", MODES)
def test_candidates_as_a_call_s_own(mode: Any) -> None:
    changed = SNAPSHOT.changed(available=0b10110)
    mask = np.array([False, True, True, False, True])
    assert_equal(changed.scores(X, TAU, mode), SNAPSHOT.scores(X, TAU, mode, available=mask))
    both = np.array([True, True, False, False, False])
    assert_equal(changed.scores(X, TAU, mode, available=both), SNAPSHOT.scores(X, TAU, mode, available=mask & both))
    assert (SNAPSHOT.changed(available=0).route(X, TAU, mode)[3] == Status.INVALID).all()


def test_no_change_is_none() -> None:
    assert_equal(SNAPSHOT.changed().scores(X, TAU), SNAPSHOT.scores(X, TAU))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"price_usd": PRICES[:3]}, ValueError, "price_usd: expected shape (5,), got (3,)"),
        ({"price_usd": -PRICES}, ValueError, "price_usd: expected finite numbers >= 0, got -0.3"),
        ({"price_usd": PRICES.tolist()}, TypeError, "price_usd: expected a C-contiguous float32 array"),
        ({"available": -1}, ValueError, "available: expected an int from 0 to 18446744073709551615, got -1"),
        ({"certified": 1}, TypeError, "certified: expected a bool, got int"),
        ({"tally": 1}, TypeError, "tally: expected a Tally or None, got int"),
        ({"tally": _core.Tally(3)}, ValueError, "tally: expected one of 5 candidates, got 3"),
    ],
)
def test_changes_that_are_none(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        SNAPSHOT.changed(**arguments)


def test_counts_are_shared_by_those_that_share_them() -> None:
    tally = _core.Tally(K)
    assert tally.counts().shape == (K + 1, 5)
    first = _core.Batcher(SNAPSHOT.changed(tally=tally))
    second = _core.Batcher(SNAPSHOT.changed(tally=tally, certified=False), before=first)
    expected = np.zeros((K + 1, 5), np.uint64)
    x = X.copy()
    x[7] = np.nan
    for batcher in (first, second, first):
        result = batcher.route(None, x, 0.5)
        # the choice -1 is the last row
        np.add.at(expected, (result.choice, result.status), 1)
    np.testing.assert_array_equal(tally.counts(), expected)
    assert expected[K, Status.INVALID] == 3
    assert first.stats() == second.stats()
    assert second.stats()["completed"] == 3
    assert second.times()["queue"].sum() == 3
    assert (second.times()["sum_ns"] > 0).all()
    # nobody counts for a library's caller
    SNAPSHOT.route(x, 0.5)
    np.testing.assert_array_equal(tally.counts(), expected)
    first.close()
    second.close()


def test_wrong_tallies() -> None:
    for candidates in (0, 65):
        with pytest.raises(ValueError, match="candidates: expected 1 to 64"):
            _core.Tally(candidates)
    with pytest.raises(TypeError, match="before: expected a Batcher or None, got int"):
        _core.Batcher(SNAPSHOT, before=1)  # type: ignore[arg-type]
