"""Captured decisions: buckets, buffers and streams of draws; as real graphs where there is a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from proteus_kernels.graphs import CapturedDecide
from tests.core.routers import RandomRouter, random_router
from tests.kernels.snapshots import DEVICE, build, on_device


@pytest.fixture(scope="module")
def router() -> RandomRouter:
    return random_router(np.random.default_rng(1), dim=24, width=32, candidates=5, hidden=16)


def rows_of(count: int, seed: int) -> torch.Tensor:
    return on_device(np.random.default_rng(seed).standard_normal((count, 24)).astype(np.float32))


def test_a_run_is_the_call_itself(router: RandomRouter) -> None:
    snapshot = build(router)
    captured = CapturedDecide(snapshot, max_rows=70)
    for rows in (1, 15, 16, 17, 33, 70, 2):
        x = rows_of(rows, rows)
        for tau in (
            0.3,
            0.3,
            0.8,
            torch.linspace(0.1, 0.9, rows, device=DEVICE),
            0.8,
            torch.tensor(0.2, device=DEVICE),
        ):
            got, expected = captured.run(x, tau), snapshot.decide(x, tau)
            for mine, theirs in zip(got, expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6, equal_nan=True)


def test_runs_work_in_the_same_buffers(router: RandomRouter) -> None:
    captured = CapturedDecide(build(router), max_rows=16)
    first = captured.run(rows_of(16, 1), 0.5)
    second = captured.run(rows_of(16, 2), 0.5)
    assert [part.data_ptr() for part in first] == [part.data_ptr() for part in second]


def test_options_are_those_of_the_capture(router: RandomRouter) -> None:
    snapshot, x = build(router), rows_of(9, 3)
    for mode in ("dual", "policy"):
        for guarantee in ("certified", "calibrated"):
            captured = CapturedDecide(snapshot, 9, torch.bfloat16, mode=mode, guarantee=guarantee)
            expected = snapshot.decide(x.bfloat16(), 0.6, mode=mode, guarantee=guarantee)
            torch.testing.assert_close(captured.run(x, 0.6).mu, expected.mu, rtol=0, atol=1e-6)
            assert torch.equal(captured.run(x, 0.6).status, expected.status)


def test_replays_draw_fresh_numbers_of_the_one_stream(router: RandomRouter) -> None:
    snapshot, x = build(router), rows_of(16, 4)
    state = on_device(np.array([5, 0], np.int64))
    captured = CapturedDecide(snapshot, 16, mode="policy", state=state)
    runs = [captured.run(x, 0.5).mu.clone() for _ in range(3)]
    assert state.tolist() == [5, 48]
    for index, mu in enumerate(runs):
        at = on_device(np.array([5, 16 * index], np.int64))
        torch.testing.assert_close(mu, snapshot.decide(x, 0.5, mode="policy", state=at).mu, rtol=0, atol=1e-6)
    assert not (runs[0] == runs[1]).any()
    assert not (runs[1] == runs[2]).any()


def test_no_gradient_is_kept(router: RandomRouter) -> None:
    """Rows of a model in training, and a first run in inference mode: neither follows the buffers around."""
    with torch.inference_mode():
        captured = CapturedDecide(build(router), max_rows=16)
        captured.run(rows_of(4, 1), 0.5)
    x, tau = rows_of(4, 2).requires_grad_(), torch.full((4,), 0.5, device=DEVICE, requires_grad=True)
    for _ in range(2):
        answers = captured.run(x * 1.0, tau * 1.0)
    assert not answers.score.requires_grad
    assert not captured._x.requires_grad
    assert not captured._tau.requires_grad


def test_wrong_arguments(router: RandomRouter) -> None:
    captured = CapturedDecide(build(router), max_rows=20)
    with pytest.raises(ValueError, match=r"^tensor: expected 1 to 20 rows, got 21"):
        captured.run(rows_of(21, 1), 0.5)
    with pytest.raises(ValueError, match=r"^tensor: expected 1 to 20 rows, got 0"):
        captured.run(rows_of(0, 1), 0.5)
    with pytest.raises(ValueError, match=r"^tensor: expected shape \(B, 24\) on .*, got \(3, 23\) on"):
        captured.run(rows_of(3, 1)[:, :23], 0.5)
    with pytest.raises(TypeError, match=r"^tensor: expected a floating dtype, got torch.int64"):
        captured.run(rows_of(3, 1).long(), 0.5)
    with pytest.raises(ValueError, match=r"^tau: expected a number in \[0, 1\], got 2.0"):
        captured.run(rows_of(3, 1), 2.0)
    with pytest.raises(ValueError, match=r"^tau: expected floats of shape \(3,\)"):
        captured.run(rows_of(3, 1), torch.zeros(4, device=DEVICE))
    with pytest.raises(ValueError, match=r"^max_rows: expected an integer >= 1, got 0"):
        CapturedDecide(build(router), max_rows=0)
    with pytest.raises(TypeError, match=r"^dtype: expected a floating dtype, got torch.int8"):
        CapturedDecide(build(router), 1, torch.int8)
