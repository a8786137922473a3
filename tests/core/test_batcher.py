"""The batcher: answers equal the engine's, the queue is bounded, deadlines and closing hold."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from proteus_fast import _core
from tests.core.routers import RandomRouter, random_router

DIM, CANDIDATES = 12, 5
ALL = 2**64 - 1


def make_encoder() -> _core.HashEncoder:
    rng = np.random.default_rng(1)
    return _core.HashEncoder(
        rng.integers(-127, 128, (64, DIM), dtype=np.int8),
        np.full(64, 0.01, np.float32),
        np.ones(64, np.float32),
        np.ones(4, np.float32),
    )


def make_router(seed: int = 0, **shape: int) -> RandomRouter:
    return random_router(
        np.random.default_rng(seed), **{"dim": DIM, "width": 0, "candidates": CANDIDATES, "hidden": 8, **shape}
    )


ENCODER = make_encoder()
SNAPSHOT = make_router().build(encoder=ENCODER)
ROWS = np.random.default_rng(2).standard_normal((64, DIM)).astype(np.float32)


@contextlib.contextmanager
def batcher_of(snapshot: _core.Snapshot = SNAPSHOT, **options: int) -> Iterator[_core.Batcher]:
    batcher = _core.Batcher(snapshot, **options)
    try:
        yield batcher
    finally:
        batcher.close(drain=False)


def assert_equal(result: _core.BatchResult, expected: tuple[Any, ...], rows: slice = slice(None)) -> None:
    names = ["choice", "mu", "score", "status", "certified_floor"]
    for name, values in zip(names, expected, strict=False):
        np.testing.assert_array_equal(getattr(result, name), values[rows], err_msg=name)
    np.testing.assert_array_equal(result.scores, expected[6][rows])


@pytest.mark.parametrize("mode", [None, "dual", "policy"])
@pytest.mark.parametrize("guarantee", ["certified", "calibrated"])
@pytest.mark.parametrize("mask", [ALL, 0b10101, 0])
def test_answers_equal_the_engine(mode: str | None, guarantee: str, mask: int) -> None:
    texts = ["first", "zweiter Text", b"\xff bytes"]
    available = np.array([mask >> i & 1 for i in range(CANDIDATES)], bool)
    options = {"mode": mode, "guarantee": guarantee}
    with batcher_of() as batcher:
        for tau in (0.8, np.array([0.1, 0.9, np.nan])):
            expected = SNAPSHOT.scores(ROWS[:3], tau, available=available, **options)  # type: ignore[arg-type]
            assert_equal(batcher.route(None, ROWS[:3], tau, available=mask, **options), expected)  # type: ignore[arg-type]
            expected = SNAPSHOT.scores(ENCODER.encode(texts), tau, available=available, **options)  # type: ignore[arg-type]
            result = batcher.route(texts, None, tau, available=mask, **options)  # type: ignore[arg-type]
            assert_equal(result, expected)
            assert min(result.queue_ns, result.encode_ns, result.decide_ns) >= 0
            assert result.version == 0


def test_callers_share_batches() -> None:
    """Entries with different options, held together by the window, are decided as one batch."""
    with batcher_of(window_us=400_000) as batcher, ThreadPoolExecutor(8) as pool:
        calls: list[tuple[Future[_core.BatchResult], tuple[Any, ...]]] = []
        for i in range(8):
            x, mode, tau = ROWS[i : i + 1 + i % 3], ("dual", "policy")[i % 2], i / 8
            calls.append((pool.submit(batcher.route, None, x, tau, mode=mode), SNAPSHOT.scores(x, tau, mode)))
        for future, expected in calls:
            assert_equal(future.result(), expected)
        assert batcher.stats()["batches"] <= 2
        assert batcher.stats()["completed"] == 8


def test_a_large_call_is_one_batch() -> None:
    with batcher_of(max_batch_size=4) as batcher:
        assert_equal(batcher.route(None, ROWS, 0.5), SNAPSHOT.scores(ROWS, 0.5))
        assert batcher.stats() == {
            "submitted": 1,
            "completed": 1,
            "rejected": 0,
            "expired": 0,
            "failed": 0,
            "batches": 1,
            "rows": 64,
            "queued_rows": 0,
        }


def wait_until_queued(batcher: _core.Batcher, rows: int) -> None:
    end = time.monotonic() + 10
    while batcher.stats()["queued_rows"] < rows:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_full_queue_refuses_at_once() -> None:
    with batcher_of(max_queue_rows=10, window_us=10_000_000) as batcher, ThreadPoolExecutor(1) as pool:
        held = pool.submit(batcher.route, None, ROWS[:8], 0.5)
        wait_until_queued(batcher, 8)
        begin = time.monotonic()
        with pytest.raises(_core.QueueFullError, match=r"^queue: expected at most 10 rows, got 11"):
            batcher.route(None, ROWS[:3], 0.5)
        assert time.monotonic() - begin < 1.0
        assert issubclass(_core.QueueFullError, RuntimeError)
        # what never fits is a mistake, not a load
        for name, texts, x in (("x", None, ROWS[:11]), ("texts", ["text"] * 11, None)):
            with pytest.raises(ValueError, match=rf"^{name}: expected at most 10 rows \(max_queue_rows\), got 11$"):
                batcher.route(texts, x, 0.5)
        batcher.close()
        assert len(held.result().choice) == 8
        assert batcher.stats()["rejected"] == 1
        assert batcher.stats()["submitted"] == 1


def test_a_deadline_raises_promptly_and_its_rows_are_not_computed() -> None:
    gate = threading.Event()

    def encode(texts: list[str]) -> np.ndarray:
        assert gate.wait(10.0)
        return np.zeros((len(texts), DIM), np.float32)

    batcher = _core.Batcher(SNAPSHOT, encode=encode)
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(batcher.route, ["held"], None, 0.5)
        # taken: the lane waits for the gate
        while batcher.stats()["submitted"] - batcher.stats()["queued_rows"] < 1:
            time.sleep(0.001)
        begin = time.monotonic()
        with pytest.raises(TimeoutError, match=r"^deadline_s: expected"):
            batcher.route(None, ROWS[:2], 0.5, deadline_s=0.05)
        assert 0.04 < time.monotonic() - begin < 0.5
        gate.set()
        assert len(held.result().choice) == 1
        batcher.close()
    assert batcher.stats()["expired"] == 1
    assert batcher.stats()["rows"] == 1
    # a window leaves half of the time
    with batcher_of(window_us=10_000_000) as batcher:
        assert len(batcher.route(None, ROWS[:2], 0.5, deadline_s=1.0).choice) == 2
    with batcher_of() as batcher:
        for passed in (0.0, -1.0):
            with pytest.raises(TimeoutError, match=r"^deadline_s: expected"):
                batcher.route(None, ROWS[:2], 0.5, deadline_s=passed)
        for late in (5.0, float("inf")):
            assert len(batcher.route(None, ROWS[:2], 0.5, deadline_s=late).choice) == 2


@pytest.mark.parametrize("drain", [True, False])
def test_closing_finishes_or_fails_what_is_queued(drain: bool) -> None:
    batcher = _core.Batcher(SNAPSHOT, window_us=10_000_000)
    with ThreadPoolExecutor(3) as pool:
        held = [pool.submit(batcher.route, None, ROWS[:1], 0.5) for _ in range(3)]
        wait_until_queued(batcher, 3)
        batcher.close(drain)
        for future in held:
            if drain:
                assert len(future.result().choice) == 1
            else:
                with pytest.raises(RuntimeError, match=r"^batcher: closed"):
                    future.result()
    with pytest.raises(RuntimeError, match=r"^batcher: closed"):
        batcher.route(None, ROWS[:1], 0.5)
    batcher.close(drain)


def test_waiting_lets_other_threads_and_signals_through() -> None:
    def interrupt(*_: object) -> None:
        raise InterruptedError

    previous = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with batcher_of(window_us=10_000_000) as batcher:
            begin = time.monotonic()
            with pytest.raises(InterruptedError):
                batcher.route(None, ROWS[:1], 0.5)
            assert time.monotonic() - begin < 5.0
            batcher.close()
            assert batcher.stats()["expired"] == 1
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, previous)


def test_a_waiting_batcher_costs_nothing() -> None:
    with batcher_of():
        begin = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - begin < 0.1


def test_calls_complete_through_a_descriptor() -> None:
    completions = _core.Completions()
    with batcher_of(window_us=100_000) as batcher:
        tickets = {
            tag: batcher.submit(None, ROWS[tag : tag + 1], 0.5, completions=completions, tag=tag) for tag in range(5)
        }
        with pytest.raises(RuntimeError, match=r"^ticket: expected an outcome to take, got none"):
            tickets[0].result()
        tickets.pop(3).abandon()
        tags: list[int] = []
        while len(tags) < 4:
            assert select.select([completions], [], [], 10.0)[0]
            tags += completions.drain()
        assert tags == [0, 1, 2, 4]
        assert completions.drain() == []
        for tag in tags:
            assert_equal(tickets[tag].result(), SNAPSHOT.scores(ROWS[tag : tag + 1], 0.5))
            with pytest.raises(RuntimeError, match=r"^ticket: expected an outcome to take, got none"):
                tickets[tag].result()
        bounds, total = batcher.times()["bound_ns"], batcher.times()["total"]
        assert (np.diff(bounds.astype(np.float64)) > 0).all()
        # four calls, each of which the window held for a tenth of a second
        assert total.sum() == total[bounds > 100_000_000].sum() == 4


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (None, TypeError, "encode: expected a C-contiguous float32 array"),
        (np.zeros((2, DIM)), TypeError, "encode: expected a C-contiguous float32 array"),
        (np.zeros((1, DIM), np.float32), ValueError, r"encode: expected shape \(2, 12\), got \(1, 12\)"),
        (np.zeros((2, DIM + 1), np.float32), ValueError, r"encode: expected shape \(2, 12\), got \(2, 13\)"),
    ],
)
def test_an_encoder_s_wrong_answer(answer: Any, error: type[Exception], text: str) -> None:
    batcher = _core.Batcher(SNAPSHOT, encode=lambda _: answer)
    with pytest.raises(RuntimeError, match=f"^backend: expected an answer, got {error.__name__}") as caught:
        batcher.route(["a", "b"], None, 0.5)
    assert isinstance(caught.value.__cause__, error)
    assert re.match(text, str(caught.value.__cause__))
    batcher.close()


def test_a_backend_that_decides_is_held_to_its_arrays() -> None:
    right = [np.zeros(2, t) for t in (np.int32, np.float32, np.float32, np.uint8, np.float32)]
    answers: list[Any] = [
        right,
        [*right, np.ones((2, CANDIDATES), np.float32)],
        right[:4],
        [*right[:4], np.zeros(3, np.float32)],
        [np.zeros(2, np.int64), *right[1:]],
        [*right, np.ones((2, 3), np.float32)],
        7,
    ]
    batcher = _core.Batcher(SNAPSHOT, route=lambda *_: answers.pop(0))
    assert batcher.route(["a", "b"], None, 0.5).scores.shape == (2, 0)
    assert batcher.route(["a", "b"], None, 0.5).scores.sum() == 2 * CANDIDATES
    while answers:
        with pytest.raises(RuntimeError, match=r"^backend: expected an answer, got (Type|Value)Error") as caught:
            batcher.route(["a", "b"], None, 0.5)
        assert re.match("route.*: expected", str(caught.value.__cause__))
    batcher.close()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"texts": ["a"]}, TypeError, "texts: expected texts or x, got both"),
        ({"x": None}, TypeError, "texts: expected texts or x, got neither"),
        ({"x": None, "texts": "abc"}, TypeError, "texts: expected a sequence of str or bytes, got str"),
        ({"x": None, "texts": []}, ValueError, "texts: expected at least one text, got none"),
        ({"x": ROWS[:0]}, ValueError, "x: expected at least one row, got none"),
        ({"x": ROWS[:, :5].copy()}, ValueError, r"x: expected shape \(64, 12\)"),
        ({"x": ROWS.astype(np.float64)}, TypeError, "x: expected a C-contiguous float32 array"),
        ({"tau": 1.5}, ValueError, r"tau: expected a number in \[0, 1\], got 1.5"),
        ({"tau": np.zeros(3)}, ValueError, r"tau: expected shape \(64,\), got \(3,\)"),
        ({"mode": "fast"}, ValueError, "mode: expected"),
        ({"guarantee": "none"}, ValueError, "guarantee: expected"),
        ({"available": -1}, ValueError, "available: expected an int from 0 to 18446744073709551615, got -1"),
        ({"available": 2**64}, ValueError, "available: expected an int"),
        ({"deadline_s": float("nan")}, ValueError, "deadline_s: expected a number of seconds, got nan"),
        ({"deadline_s": "1"}, TypeError, "deadline_s: expected a number, got str"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with batcher_of() as batcher, pytest.raises(error, match=f"^{text}"):
        batcher.route(**{"texts": None, "x": ROWS, "tau": 0.5, **arguments})


def test_wrong_batchers() -> None:
    for options, error in [
        ({"max_batch_size": 0}, ValueError),
        ({"max_queue_rows": 0}, ValueError),
        ({"window_us": -1}, ValueError),
        ({"window_us": 0.5}, TypeError),
        ({"window_us": 2**62}, ValueError),
        ({"token_budget": -1}, ValueError),
        ({"lanes": 0}, ValueError),
        ({"encode": 3}, TypeError),
        ({"route": max, "encode": max}, TypeError),
    ]:
        with pytest.raises(error, match=rf"^{next(iter(options))}: expected"):
            _core.Batcher(SNAPSHOT, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^snapshot: expected a Snapshot, got None"):
        _core.Batcher(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^snapshot: expected a Snapshot, got int"):
        _core.Batcher(3)  # type: ignore[arg-type]
