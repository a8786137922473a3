"""The fused decision against the float64 reference and against the C++ core."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from proteus_kernels.snapshot import Snapshot
from tests.core.routers import FEASIBLE, INVALID, UNCERTIFIED, PathTable, RandomRouter, decide_ref, random_router
from tests.core.test_engine import TOLERANCE, random_call
from tests.kernels.snapshots import DEVICE, build, decide, on_device

# the largest error of a score where matrix products are rounded to bfloat16
BFLOAT16_TOLERANCE = 0.02


def assert_parity(
    router: RandomRouter, snapshot: Snapshot, x: NDArray[np.float32], call: dict[str, Any], tolerance: float = TOLERANCE
) -> None:
    got = decide(snapshot, x, call)
    expected = decide_ref(router, x, **call)
    core = router.build().route(x, **call)
    valid = expected.choice >= 0
    np.testing.assert_array_equal(got.choice.numpy() >= 0, valid)
    np.testing.assert_allclose(got.mu.numpy(), expected.mu, rtol=0, atol=tolerance)
    np.testing.assert_allclose(got.score.numpy(), expected.score, rtol=0, atol=tolerance)
    assert got.choice.max() < router.candidates
    top = np.sort(np.where(valid[:, None], expected.scores, 0.0), axis=1)
    clear = valid & (top[:, -1] - top[:, -2] > 2 * tolerance) if router.candidates > 1 else valid
    np.testing.assert_array_equal(got.choice.numpy()[clear], expected.choice[clear])
    np.testing.assert_array_equal(got.choice.numpy()[clear], core[0][clear])
    if snapshot.precision == "float32":
        # what the row's numbers do not change is the core's to the bit: status, floor, and with mu the mixing side
        np.testing.assert_array_equal(got.status.numpy(), core[3])
        np.testing.assert_array_equal(got.certified_floor.numpy(), core[4])
        if (call.get("mode") or router.default_mode) == "dual":
            np.testing.assert_array_equal(got.mu.numpy(), core[1])
    else:
        assert set(got.status.numpy()[valid]) <= {UNCERTIFIED}


@pytest.mark.parametrize("seed", range(40))
def test_parity_with_the_reference_and_the_core(seed: int) -> None:
    rng = np.random.default_rng(seed)
    router = random_router(rng)
    snapshot = build(router)
    for _ in range(3):
        rows = int(rng.choice([1, 2, 15, 16, 17, 50]))
        assert_parity(router, snapshot, *random_call(rng, router, rows))


@pytest.mark.verify
def test_parity_on_fifty_thousand_rows() -> None:
    for seed in range(1000, 1250):
        rng = np.random.default_rng(seed)
        router = random_router(rng)
        snapshot = build(router)
        for _ in range(2):
            assert_parity(router, snapshot, *random_call(rng, router, 100))


SHAPES = [
    {"dim": 256, "width": 0, "candidates": 11, "hidden": 256},
    {"dim": 768, "width": 256, "candidates": 64, "hidden": 256},
    {"dim": 1024, "width": 300, "candidates": 33, "hidden": 300},
    {"dim": 79, "width": 0, "candidates": 1, "hidden": 0},
    {"dim": 1, "width": 24, "candidates": 2, "hidden": 1},
    {"dim": 1024, "width": 0, "candidates": 64, "hidden": 513},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_parity_by_shape_and_tile(shape: dict[str, int], wide: bool) -> None:
    rng = np.random.default_rng(1)
    router = random_router(rng, **shape)
    snapshot = build(router)
    # as if the GPU had one multiprocessor, so that a small batch is cut into wide tiles
    snapshot._multiprocessors = 1 if wide else 1000
    for rows in (40, 33):
        assert_parity(router, snapshot, *random_call(rng, router, rows))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_products_stay_within_their_bound(shape: dict[str, int]) -> None:
    rng = np.random.default_rng(2)
    for _ in range(3):
        router = random_router(rng, **shape)
        assert_parity(router, build(router, precision="bfloat16"), *random_call(rng, router, 70), BFLOAT16_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_their_rows_in_float32(dtype: torch.dtype) -> None:
    """The mixing side and the choice are those of the row as float32, as on the CPU."""
    rng = np.random.default_rng(3)
    for dim in (48, 77):
        router = random_router(rng, dim=dim, candidates=9, hidden=32)
        snapshot = build(router)
        x, call = random_call(rng, router, 40)
        given = torch.from_numpy(x).to(DEVICE, dtype)
        got = decide(snapshot, given, call)
        core = router.build().route(given.float().cpu().numpy(), **call)
        for mine, theirs in zip(got, core, strict=True):
            np.testing.assert_allclose(mine.numpy(), theirs, rtol=0, atol=TOLERANCE)
        assert (got.choice.numpy() == core[0]).mean() > 0.97


def plain_router(**changes: Any) -> RandomRouter:
    rng = np.random.default_rng(7)
    router = random_router(rng, dim=8, width=0, candidates=4, hidden=8)
    codes = np.where(np.arange(1001) < 500, 16, 0).astype(np.int32)
    table = PathTable(np.array([0.75, 0.25], np.float32), codes, 700, codes, 900)
    return dataclasses.replace(router, **{"default_mode": "policy", "dual": table, "policy": table, **changes})


ROW = np.linspace(-1, 1, 8, dtype=np.float32)[None]


@pytest.mark.parametrize("mode", ["dual", "policy"])
def test_targets_on_and_off_the_grid(mode: str) -> None:
    """Every target that a caller may type: the grid's, those beside the slack of 1e-3 steps, those out of range."""
    router = plain_router()
    grid = np.concatenate([np.arange(0, 1001, 17), np.arange(498, 503), np.arange(698, 703), [1, 999, 1000]]) / 1000
    tau = np.concatenate([grid, grid + 1e-6, grid - 1e-6, grid + 0.999e-6, grid + 1.001e-6, [np.nan, -0.0, 2.0, -1.0]])
    x = np.repeat(ROW, len(tau), axis=0)
    for given in (tau, tau.astype(np.float32), np.full(len(tau), np.inf)):
        got, core = decide(build(router), x, {"tau": given, "mode": mode}), router.build().route(x, given, mode)
        np.testing.assert_array_equal(got.status.numpy(), core[3])
        np.testing.assert_array_equal(got.certified_floor.numpy(), core[4])
        np.testing.assert_allclose(got.mu.numpy(), core[1], rtol=0, atol=TOLERANCE)
    for value in (0.0, 0.4999995, 0.5, 0.500002, 0.7, 0.7001, 1.0):
        got, core = decide(build(router), x[:1], {"tau": value, "mode": mode}), router.build().route(x[:1], value, mode)
        assert (got.status[0], got.mu[0]) == (core[3][0], pytest.approx(core[1][0], abs=TOLERANCE))


def test_every_mixing_share_is_the_cores() -> None:
    rng = np.random.default_rng(6)
    x = rng.standard_normal((64, 8)).astype(np.float32)
    x[:2], x[2] = [[0.0], [-0.0]], 1e-42
    router = random_router(rng, dim=8, width=0, hidden=0, candidates=3)
    ids = rng.integers(0, 2**64, 64, dtype=np.uint64)
    for code in range(32):
        codes = np.full(1001, code, np.int32)
        table = PathTable(np.array([0.9, 0.5, 0.1], np.float32), codes, 1000, codes, 1000)
        one = dataclasses.replace(router, dual=table, key=(code * 0x9E3779B97F4A7C15) % 2**64)
        for call in ({"tau": 0.5}, {"tau": 0.5, "ids": ids}):
            got = decide(build(one), x, call)
            np.testing.assert_array_equal(got.mu.numpy(), one.build().route(x, **call)[1])


def test_ties_go_to_the_lowest_index_and_mu_one_ignores_cost() -> None:
    table = PathTable(np.ones(1, np.float32), *[np.zeros(1001, np.int32), 1000] * 2)
    router = plain_router(default_mode="dual", dual=table)
    router.tensors["predictor.weight"][:] = 0.0
    router.tensors["predictor.bias"][:] = [0.1, 0.3, 0.3, 0.3]
    snapshot = build(router)
    price = np.array([0, 1e9, 1, 0.0])
    assert decide(snapshot, ROW, {"tau": 0.5, "price_usd": price}).choice[0] == 1
    assert decide(snapshot, ROW, {"tau": 0.5, "available": np.array([1, 0, 1, 1], bool)}).choice[0] == 2


def test_mu_zero_and_one_candidate_left() -> None:
    table = PathTable(np.zeros(1, np.float32), *[np.zeros(1001, np.int32), 1000] * 2)
    router = plain_router(default_mode="dual", dual=table)
    for only in range(4):
        available = np.arange(4) == only
        call = {"tau": 0.5, "available": available}
        assert_parity(router, build(router), ROW, call)
        assert decide(build(router), ROW, call).choice[0] == only


def test_targets_outside_the_knots_are_constant() -> None:
    router = plain_router(policy=None, default_mode="dual")
    router.tensors["policy.knots_tau"] = np.array([0.4, 0.6], np.float32)
    for name in ("policy.knots_dual", "policy.knots_mu"):
        router.tensors[name] = np.array([0.2, 0.7], np.float32)
    x = np.repeat(ROW, 7, axis=0)
    tau = np.array([0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0])
    assert_parity(router, build(router), x, {"tau": tau, "mode": "policy"})
    for value in tau:
        assert_parity(router, build(router), ROW, {"tau": float(value), "mode": "policy"})


def test_bad_values_spoil_their_own_row_only() -> None:
    router = plain_router()
    x = np.repeat(ROW, 8, axis=0)
    x[1, 3], x[2, 0], x[3] = np.nan, -np.inf, np.inf
    price = np.ones((8, 4))
    price[4, 1], price[5, 2], price[6, 0] = -1.0, np.nan, np.inf
    got = decide(build(router), x, {"tau": 0.5, "price_usd": price})
    assert got.status.tolist() == [UNCERTIFIED, *[INVALID] * 6, UNCERTIFIED]
    assert (got.choice[1:7] == -1).all()
    for values in (got.mu, got.score, got.certified_floor):
        assert values[1:7].isnan().all()
    assert got.score[0] == got.score[7]


@pytest.mark.parametrize("head", ["residual", "free"])
def test_a_policy_that_overflows_is_invalid(head: str) -> None:
    """Finite rows, predictions that stand, and no preference: as in the core, not a cheap answer."""
    router = plain_router(head=head)
    router.tensors["policy.w1"][:8] *= 1e3
    router.tensors["predictor.weight"][:] *= 1e-38
    x = (np.random.default_rng(0).standard_normal((24, 8)) * 1e37).astype(np.float32)
    core = router.build().route(x, 0.5, "policy")
    got = decide(build(router), x, {"tau": 0.5, "mode": "policy"})
    assert (core[3] == INVALID).any()
    np.testing.assert_array_equal(got.status.numpy(), core[3])
    np.testing.assert_array_equal(got.choice.numpy(), core[0])


def test_a_small_gamma_at_mu_one_costs_nothing() -> None:
    table = PathTable(np.ones(1, np.float32), *[np.zeros(1001, np.int32), 1000] * 2)
    router = plain_router(default_mode="dual", dual=table, gamma=0.05)
    assert_parity(router, build(router), ROW, {"tau": 0.5, "price_usd": np.array([1.0, 2.0, 3.0, 1e3])})


def test_torchs_default_dtype_changes_nothing() -> None:
    router = plain_router()
    expected = decide(build(router), ROW, {"tau": 0.5})
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = decide(build(router), ROW, {"tau": 0.5})
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got.score, expected.score)


def test_batch_equals_singles() -> None:
    """Whatever rows are beside it in its tile. The interpreter's products are NumPy's, which differ by a last bit."""
    rng = np.random.default_rng(4)
    router = random_router(rng, dim=40, candidates=7, hidden=24)
    snapshot = build(router)
    x, call = random_call(rng, router, 37)
    batch = decide(snapshot, x, call)
    for row in (0, 15, 16, 36):
        one = {
            name: value[row : row + 1] if isinstance(value, np.ndarray) and len(value) == 37 else value
            for name, value in call.items()
        }
        for single, whole in zip(decide(snapshot, x[row : row + 1], one), batch, strict=True):
            np.testing.assert_allclose(single[0], whole[row], rtol=0, atol=1e-6)


def test_samples_are_the_cores() -> None:
    rng = np.random.default_rng(5)
    for seed in (0, 2**63, 2**64 - 1):
        router = random_router(rng, dim=20, candidates=5, hidden=16)
        x, _ = random_call(rng, router, 40)
        _, mu, _, status, _ = router.build().route(x, 0.5, "policy", sample=True, seed=seed)
        words = np.array([seed, 0], np.uint64).view(np.int64)
        got = decide(build(router), x, {"tau": 0.5, "mode": "policy", "state": words})
        np.testing.assert_allclose(got.mu.numpy(), mu, rtol=0, atol=TOLERANCE)
        np.testing.assert_array_equal(got.status.numpy(), status)
        # an offset of 15 rows is 15 rows further in the stream
        shifted = decide(build(router), x[15:], {"tau": 0.5, "mode": "policy", "state": np.array([words[0], 15])})
        np.testing.assert_allclose(shifted.mu.numpy(), got.mu.numpy()[15:], rtol=0, atol=TOLERANCE)


def test_strides_and_broadcast() -> None:
    rng = np.random.default_rng(8)
    router = random_router(rng, dim=16, candidates=6, hidden=8)
    snapshot = build(router)
    x = rng.standard_normal((20, 16)).astype(np.float32)
    expected = decide(snapshot, x, {"tau": 0.6})
    views = {
        "every other row": on_device(np.repeat(x, 2, axis=0))[::2],
        "by columns": on_device(np.asfortranarray(x).T.copy()).T,
        "a window": on_device(np.pad(x, ((0, 0), (3, 5))))[:, 3:19],
    }
    for name, view in views.items():
        assert torch.equal(decide(snapshot, view, {"tau": 0.6}).choice, expected.choice), name
    tau = torch.tensor(0.6, dtype=torch.float64, device=DEVICE)
    assert torch.equal(snapshot.decide(on_device(x), tau).choice.cpu(), expected.choice)
    assert len(snapshot.decide(on_device(x[:0]), 0.6).choice) == 0


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"x": torch.zeros(1, 7)}, ValueError, r"tensor: expected 8 columns, got shape \(1, 7\)"),
        ({"x": torch.zeros(8)}, ValueError, r"tensor: expected shape \(B, 8\), got \(8,\)"),
        ({"x": torch.zeros(1, 8, dtype=torch.int32)}, TypeError, "tensor: expected a floating dtype, got int32"),
        ({"x": torch.zeros(1, 2, 8)}, ValueError, r"mask: expected \(B, T\) with hidden states"),
        ({"tau": 1.0000001}, ValueError, r"tau: expected a number in \[0, 1\], got 1.0000001"),
        ({"tau": float("nan")}, ValueError, r"tau: expected a number in \[0, 1\], got nan"),
        ({"tau": torch.zeros(2)}, ValueError, r"tau: expected shape \(1,\) or \(\), got \(2,\)"),
        ({"tau": torch.zeros(1, dtype=torch.int64)}, TypeError, "tau: expected float32 or bfloat16"),
        ({"mode": "fast"}, ValueError, 'mode: expected "dual" or "policy", got "fast"'),
        ({"guarantee": "none"}, ValueError, 'guarantee: expected "certified" or "calibrated", got "none"'),
        ({"available": torch.ones(3, dtype=torch.bool)}, ValueError, r"available: expected shape \(4,\) or \(1, 4\)"),
        ({"available": torch.ones(4)}, TypeError, "available: expected bool, got float32"),
        ({"available": np.ones(4, bool)}, TypeError, "available: expected a tensor on .*, got ndarray"),
        ({"price_usd": torch.ones(2, 4)}, ValueError, "price_usd: expected shape"),
        ({"price_usd": torch.ones(4, dtype=torch.int32)}, TypeError, "price_usd: expected float32"),
        ({"ids": torch.zeros(1)}, TypeError, "ids: expected int64 or uint64, got float32"),
        ({"ids": torch.zeros(2, dtype=torch.int64)}, ValueError, r"ids: expected shape \(1,\), got \(2,\)"),
        ({"state": torch.zeros(3, dtype=torch.int64)}, ValueError, r"state: expected shape \(2,\), got \(3,\)"),
        ({"state": torch.zeros(2, 2, dtype=torch.int64)[:, 0]}, ValueError, "state: expected a contiguous tensor"),
        ({"state": torch.zeros(2, dtype=torch.int64), "mode": "dual"}, ValueError, 'sample: expected mode "policy"'),
        ({"mask": torch.ones(1, 2)}, ValueError, "tensor: expected hidden states"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    call = {"x": torch.from_numpy(ROW), "tau": 0.5, **arguments}
    call = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    with pytest.raises(error, match=f"^{text}"):
        build(plain_router()).decide(call.pop("x"), call.pop("tau"), **call)


def test_wrong_devices_and_modes() -> None:
    snapshot = build(plain_router())
    elsewhere = torch.device("meta")
    with pytest.raises(ValueError, match=r"^tensor: expected a tensor on .*, got one on meta"):
        snapshot.decide(torch.zeros(1, 8, device=elsewhere), 0.5)
    with pytest.raises(ValueError, match=r"^tau: expected a tensor on .*, got one on meta"):
        snapshot.decide(on_device(ROW), torch.zeros(1, device=elsewhere))
    without = build(random_router(np.random.default_rng(9), dim=8, hidden=0))
    with pytest.raises(ValueError, match=r'^mode: expected "dual" \(the checkpoint has no policy\), got "policy"'):
        without.decide(on_device(ROW), 0.5, mode="policy")
    with pytest.raises(ValueError, match=r"^precision: expected 'float32' or 'bfloat16', got 'int8'"):
        build(plain_router(), precision="int8")


def test_a_plain_call_is_feasible() -> None:
    got = decide(build(plain_router()), ROW, {"tau": 0.5})
    assert (got.status[0], got.certified_floor[0]) == (FEASIBLE, np.float32(0.5))
