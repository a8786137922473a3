"""The engine against the float64 reference, and what it does with bad values and wrong arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from proteus_fast import _core
from proteus_kernels import reference
from tests.core.routers import (
    FEASIBLE,
    INFEASIBLE,
    INVALID,
    UNCERTIFIED,
    PathTable,
    RandomRouter,
    decide_ref,
    random_router,
)

TOLERANCE = 1e-5
TIE = 2e-5


def random_call(
    rng: np.random.Generator, router: RandomRouter, rows: int
) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """Rows and arguments of every kind: scalar and array tau, masks, prices, ids, bad values in some rows."""
    k = router.candidates
    x = rng.standard_normal((rows, router.input_dim)).astype(np.float32)
    x[rng.random(rows) < 0.05] = x[0]
    tau = rng.integers(0, 1001, rows) / 1000 if rng.random() < 0.5 else rng.random(rows)
    tau[rng.random(rows) < 0.1] = rng.choice([0.0, -0.0, 1.0])
    call: dict[str, Any] = {"tau": float(tau[0])}
    kind = rng.integers(3)
    if kind:
        call["tau"] = tau if kind == 1 else tau.astype(np.float32)
    call["mode"] = rng.choice([None, *router.modes])
    call["guarantee"] = str(rng.choice(["certified", "calibrated"]))
    kind = rng.integers(4)
    if kind:
        shape = (k,) if kind == 1 else (rows, k)
        call["available"] = rng.random(shape) < rng.choice([0.5, 0.97])
    kind = rng.integers(4)
    if kind:
        shape = (k,) if kind == 1 else (rows, k)
        price = rng.random(shape) / 1000
        # equal prices and, below, equal scores
        price = np.round(price, 4) if rng.random() < 0.5 else price
        call["price_usd"] = price if rng.random() < 0.5 else price.astype(np.float32)
    if rng.random() < 0.3:
        call["ids"] = rng.integers(0, 2**64, rows, dtype=np.uint64)
    if rng.random() < 0.3:
        bad = rng.random(rows) < 0.05
        x[bad, rng.integers(router.input_dim)] = rng.choice([np.nan, np.inf, -np.inf])
        if isinstance(call["tau"], np.ndarray):
            call["tau"][rng.random(rows) < 0.05] = rng.choice([np.nan, np.inf, -0.001, 1.0001])
        if call.get("price_usd", np.zeros(0)).ndim == 2:
            call["price_usd"][rng.random((rows, k)) < 0.01] = rng.choice([np.nan, np.inf, -1.0])
    return x, {name: value for name, value in call.items() if value is not None}


def assert_parity(router: RandomRouter, x: NDArray[np.float32], call: dict[str, Any]) -> None:
    snapshot = router.build()
    choice, mu, score, status, floor, predicted, scores = snapshot.scores(x, **call)
    expected = decide_ref(router, x, **call)
    np.testing.assert_array_equal(status, expected.status)
    np.testing.assert_allclose(floor, expected.floor, rtol=0, atol=1e-7)
    np.testing.assert_allclose(mu, expected.mu, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(predicted, expected.predicted, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(scores, expected.scores, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(score, expected.score, rtol=0, atol=TOLERANCE)
    valid = expected.choice >= 0
    np.testing.assert_array_equal(choice >= 0, valid)
    top = np.sort(np.where(valid[:, None], expected.scores, 0.0), axis=1)
    clear = valid & (top[:, -1] - top[:, -2] > TIE) if router.candidates > 1 else valid
    np.testing.assert_array_equal(choice[clear], expected.choice[clear])
    # the choice explains the scores that came with it: the first of the best
    np.testing.assert_array_equal(choice[valid], scores[valid].argmax(axis=1))
    np.testing.assert_array_equal(score[valid], scores[valid].max(axis=1))
    for got, again in zip(snapshot.route(x, **call), (choice, mu, score, status, floor), strict=True):
        np.testing.assert_array_equal(got, again)


def assert_parity_of_random_routers(count: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        router = random_router(rng)
        for _ in range(4):
            assert_parity(router, *random_call(rng, router, rows // 4))


def test_parity_with_the_reference() -> None:
    assert_parity_of_random_routers(count=200, rows=500, seed=1)


@pytest.mark.verify
def test_parity_with_the_reference_on_a_million_rows() -> None:
    assert_parity_of_random_routers(count=1000, rows=1000, seed=2)


@pytest.mark.parametrize(
    "shape",
    [
        {"dim": 256, "width": 0, "candidates": 11, "hidden": 256},
        {"dim": 768, "width": 256, "candidates": 64, "hidden": 256},
        {"dim": 88, "width": 0, "candidates": 1, "hidden": 0},
    ],
)
def test_parity_at_real_sizes(shape: dict[str, int]) -> None:
    rng = np.random.default_rng(3)
    for _ in range(4):
        router = random_router(rng, **shape)
        assert_parity(router, *random_call(rng, router, 300))


def test_batch_equals_singles_bit_for_bit() -> None:
    rng = np.random.default_rng(4)
    for _ in range(30):
        router = random_router(rng)
        snapshot = router.build()
        rows = int(rng.integers(1, 120))
        x, call = random_call(rng, router, rows)
        batch = snapshot.scores(x, **call)
        order = rng.permutation(rows)[:20]
        for r in order:
            one = {
                name: value[r : r + 1] if isinstance(value, np.ndarray) and len(value) == rows else value
                for name, value in call.items()
            }
            for single, whole in zip(snapshot.scores(x[r : r + 1], **one), batch, strict=True):
                np.testing.assert_array_equal(single[0], whole[r])


def test_row_hash_and_sides_equal_the_reference() -> None:
    rng = np.random.default_rng(5)
    for dim in (1, 2, 15, 16, 17, 88, 256):
        x = rng.standard_normal((500, dim)).astype(np.float32)
        x[:3] = [[0.0], [-0.0], [np.float32(1e-42)]]
        key = int(rng.integers(0, 2**64, dtype=np.uint64))
        expected = reference.row_hash_ref(torch.from_numpy(x), key).numpy().view(np.uint64)
        np.testing.assert_array_equal(_core.row_hash(x, key), expected)
    assert _core.row_hash(np.zeros((1, 3), np.float32), 1) == _core.row_hash(-np.zeros((1, 3), np.float32), 1)
    ids = rng.integers(0, 2**64, 500, dtype=np.uint64)
    expected = reference.row_hash_ref(torch.from_numpy(ids.view(np.int64)), 7).numpy().view(np.uint64)
    np.testing.assert_array_equal(_core.row_hash(ids, 7), expected)


def test_every_mixing_share_is_served() -> None:
    rng = np.random.default_rng(6)
    x = rng.standard_normal((2000, 8)).astype(np.float32)
    u = reference.row_hash_ref(torch.from_numpy(x), 42)
    for code in range(32):
        codes = np.full(1001, code, np.int32)
        table = PathTable(np.array([0.9, 0.5, 0.1], np.float32), codes, 1000, codes, 1000)
        router = random_router(rng, dim=8, width=0, hidden=0)
        snapshot = router.build(dual=table.build(), key=42)
        vertex = reference.mixing_side_ref(u, torch.full((2000,), code, dtype=torch.int32)).numpy()
        np.testing.assert_array_equal(snapshot.route(x, 0.5)[1], table.parameter[vertex])


def make_router(**changes: Any) -> RandomRouter:
    """A small router with a policy, both modes on known paths: certified up to .7, calibrated up to .9."""
    rng = np.random.default_rng(7)
    router = random_router(rng, dim=8, width=0, candidates=4, hidden=8)
    codes = np.where(np.arange(1001) < 500, 16, 0).astype(np.int32)
    table = PathTable(np.array([0.75, 0.25], np.float32), codes, 700, codes, 900)
    fields = {"default_mode": "policy", "dual": table, "policy": table, **changes}
    return RandomRouter(**{**vars(router), **fields})


ROW = np.linspace(-1, 1, 8, dtype=np.float32)[None]


@pytest.mark.parametrize(
    ("tau", "options", "status", "floor"),
    [
        (0.5, {}, FEASIBLE, 0.5),
        (0.4996, {}, FEASIBLE, 0.5),
        (float(np.float32(0.7)), {}, FEASIBLE, 0.7),
        (0.0, {}, FEASIBLE, 0.0),
        (-0.0, {}, FEASIBLE, 0.0),
        (0.7001, {}, INFEASIBLE, 0.7),
        (1.0, {}, INFEASIBLE, 0.7),
        (0.5, {"mode": "policy"}, FEASIBLE, 0.5),
        (0.5, {"mode": "dual"}, UNCERTIFIED, np.nan),
        (0.8, {"mode": "dual"}, UNCERTIFIED, np.nan),
        (0.5, {"guarantee": "calibrated"}, UNCERTIFIED, np.nan),
        (0.8, {"guarantee": "calibrated"}, UNCERTIFIED, np.nan),
        (0.95, {"guarantee": "calibrated"}, INFEASIBLE, np.nan),
        (0.5, {"available": np.ones(4, bool)}, FEASIBLE, 0.5),
        (0.5, {"available": np.array([1, 1, 0, 1], bool)}, UNCERTIFIED, np.nan),
        (0.8, {"available": np.array([[1, 1, 0, 1]], bool)}, UNCERTIFIED, np.nan),
        (0.5, {"price_usd": np.ones(4)}, UNCERTIFIED, np.nan),
        (0.5, {"sample": True}, UNCERTIFIED, np.nan),
        (0.5, {"available": np.zeros(4, bool)}, INVALID, np.nan),
        (0.5, {"price_usd": np.array([1, 1, 1, -1.0])}, INVALID, np.nan),
    ],
)
def test_status_and_floor(tau: float, options: dict[str, Any], status: int, floor: float) -> None:
    for given in (tau, np.array([tau])):
        _, _, _, got, certified_floor = make_router().build().route(ROW, given, **options)
        assert got[0] == status
        np.testing.assert_allclose(certified_floor[0], floor, atol=1e-7)


def test_infeasible_serves_the_most_accurate_and_may_have_no_floor() -> None:
    table = PathTable(*(vars(make_router().dual) | {"certified_max": -1}).values())
    router = make_router(default_mode="dual", dual=table)
    _, mu, _, status, floor = router.build().route(ROW, 0.1)
    assert (mu[0], status[0]) == (0.75, INFEASIBLE)
    assert np.isnan(floor[0])


def test_a_policy_without_a_path_takes_tau_itself() -> None:
    router = make_router(policy=None)
    assert router.build().route(ROW, 0.5)[3][0] == UNCERTIFIED
    assert_parity(router, ROW, {"tau": 0.3141})


def test_ties_go_to_the_lowest_index_and_mu_one_ignores_cost() -> None:
    router = make_router(
        default_mode="dual", dual=PathTable(np.ones(1, np.float32), *[np.zeros(1001, np.int32), 1000] * 2)
    )
    router.tensors["predictor.weight"][:] = 0.0
    router.tensors["predictor.bias"][:] = [0.1, 0.3, 0.3, 0.3]
    snapshot = router.build()
    choice, _, score, _, _, predicted, _ = snapshot.scores(ROW, 0.5, price_usd=np.array([0, 1e9, 1, 0.0]))
    assert choice[0] == 1
    assert score[0] == predicted[0, 1]
    assert snapshot.route(ROW, 0.5, available=np.array([1, 0, 1, 1], bool))[0][0] == 2


def test_a_call_inside_a_call_leaves_its_arguments_alone() -> None:
    """Python runs between the arguments: an index, or a finalizer of the collector's, may call again."""
    router = random_router(np.random.default_rng(4), dim=8, width=0, candidates=4, hidden=8)
    snapshot = router.build()
    rows = np.random.default_rng(5).standard_normal((64, 8)).astype(np.float32)
    only = np.eye(4, dtype=bool)
    prices = np.full((64, 4), 0.001, np.float32)

    class Seed:
        def __index__(self) -> int:
            snapshot.route(rows, np.full(64, 0.1, np.float32), available=np.tile(only[3], (64, 1)), price_usd=prices)
            return 1

    for candidate in range(3):
        mask = np.tile(only[candidate], (4, 1))
        choice = snapshot.route(rows[:4], 0.5, "policy", available=mask, sample=True, seed=Seed())[0]  # type: ignore[arg-type]
        assert choice.tolist() == [candidate] * 4


def test_overflow_is_invalid() -> None:
    x = np.full((2, 8), 3e38, np.float32)
    x[1] = 1.0
    choice, mu, score, status, floor, predicted, scores = make_router().build().scores(x, 0.5)
    assert status.tolist() == [INVALID, FEASIBLE]
    assert choice[0] == -1
    for values in (mu[0], score[0], floor[0], predicted[0], scores[0]):
        assert np.isnan(values).all()


def test_samples_follow_the_policy_and_repeat() -> None:
    snapshot = make_router().build()
    x = np.repeat(ROW, 20_000, axis=0)
    first = snapshot.route(x, 0.5, sample=True, seed=3)[1]
    np.testing.assert_array_equal(first, snapshot.route(x, 0.5, sample=True, seed=3)[1])
    np.testing.assert_array_equal(first[:7], snapshot.route(x[:7], 0.5, sample=True, seed=3)[1])
    assert (first != snapshot.route(x, 0.5, sample=True, seed=4)[1]).mean() > 0.99
    router = make_router()
    table = router.policy
    assert table is not None
    tensors = {name: torch.from_numpy(value).double() for name, value in router.tensors.items()}
    parameter = torch.tensor([float(table.parameter[0])], dtype=torch.float64)
    conc1, conc0, _ = reference.policy_ref(torch.from_numpy(ROW).double(), parameter, tensors, router.head or "")
    expected = _core.sample_beta(np.repeat(conc1.numpy(), 20_000), np.repeat(conc0.numpy(), 20_000), seed=3)
    np.testing.assert_allclose(first, expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["dual", "policy"])
def test_choose_path_is_route_at_every_vertex(mode: str) -> None:
    rng = np.random.default_rng(8)
    for width in (0, 12):
        router = random_router(rng, dim=20, width=width, candidates=9, hidden=24)
        table = PathTable.random(rng)
        snapshot = router.build(dual=table.build(), policy=table.build())
        x = rng.standard_normal((150, 20)).astype(np.float32)
        x[3, 5] = np.nan
        prices = [None, rng.random(9), rng.random((150, 9)).astype(np.float32)]
        for price_usd in prices:
            got = snapshot.choose_path(x, mode, price_usd)
            assert got.shape == (len(table.parameter), 150)
            assert got.dtype == np.int32
            for vertex, choices in enumerate(got):
                codes = np.full(1001, vertex * 16, np.int32)
                one = _core.Path(table.parameter, codes, 1000, codes, 1000)
                alone = router.build(dual=one, policy=one)
                np.testing.assert_array_equal(choices, alone.route(x, 0.5, mode, price_usd=price_usd)[0])


def test_empty_batch() -> None:
    snapshot = make_router().build()
    x = np.zeros((0, 8), np.float32)
    for tau in (0.5, np.zeros(0)):
        results = snapshot.scores(x, tau, available=np.zeros((0, 4), bool), price_usd=np.zeros((0, 4)))
        assert [len(values) for values in results] == [0] * 7
        assert results[6].shape == (0, 4)
    assert snapshot.choose_path(x, "dual").shape == (2, 0)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"x": ROW.astype(np.float64)}, TypeError, "x: expected a C-contiguous float32 array of shape .B, 8., got"),
        ({"x": ROW.repeat(2, 0)[:, ::2]}, TypeError, "x: expected a C-contiguous float32 array"),
        (
            {"x": np.frombuffer(b"0" + ROW.tobytes(), np.uint8)[1:].view(np.float32)[None]},
            TypeError,
            "x: expected a C-contiguous float32 array of shape .B, 8., got .* not contiguous or not aligned",
        ),
        ({"x": ROW.astype(">f4")}, TypeError, "x: expected a C-contiguous float32 array"),
        ({"x": ROW.tolist()}, TypeError, "x: expected a C-contiguous float32 array of shape .B, 8., got list"),
        ({"x": ROW[0]}, ValueError, r"x: expected shape \(B, 8\), got \(8,\)"),
        ({"x": ROW[:, :7].copy()}, ValueError, r"x: expected shape \(B, 8\), got \(1, 7\)"),
        ({"tau": 1.0000001}, ValueError, r"tau: expected a number in \[0, 1\], got 1.0000001"),
        ({"tau": float("nan")}, ValueError, r"tau: expected a number in \[0, 1\], got nan"),
        ({"tau": "0.5"}, TypeError, "tau: expected a number"),
        ({"tau": np.zeros(2)}, ValueError, r"tau: expected shape \(1,\), got \(2,\)"),
        ({"tau": np.zeros((1, 1))}, ValueError, r"tau: expected shape \(1,\), got \(1, 1\)"),
        ({"tau": np.zeros(1, np.float16)}, TypeError, "tau: expected a C-contiguous float64 or float32 array"),
        ({"mode": "fast"}, ValueError, 'mode: expected "dual" or "policy", got "fast"'),
        ({"mode": 3}, TypeError, "mode: expected a str, got int"),
        ({"guarantee": "none"}, ValueError, 'guarantee: expected "certified" or "calibrated", got "none"'),
        ({"guarantee": None}, TypeError, "guarantee: expected a str, got NoneType"),
        ({"available": np.ones(4)}, TypeError, "available: expected a C-contiguous bool array"),
        ({"available": np.ones(3, bool)}, ValueError, r"available: expected shape \(4,\) or \(1, 4\), got \(3,\)"),
        ({"available": np.ones((2, 4), bool)}, ValueError, "available: expected shape"),
        ({"price_usd": np.ones(5)}, ValueError, "price_usd: expected shape"),
        ({"price_usd": np.ones(4, np.int64)}, TypeError, "price_usd: expected a C-contiguous float64 or float32"),
        ({"ids": np.zeros(1, np.int64)}, TypeError, "ids: expected a C-contiguous uint64 array"),
        ({"ids": np.zeros(2, np.uint64)}, ValueError, r"ids: expected shape \(1,\), got \(2,\)"),
        ({"sample": 1}, TypeError, "sample: expected a bool, got int"),
        ({"sample": True, "mode": "dual"}, ValueError, 'sample: expected mode "policy", got mode "dual"'),
        ({"seed": -1}, ValueError, "seed: expected an int from 0 to 18446744073709551615, got -1"),
        ({"seed": 0.5}, TypeError, "seed: expected an int, got float"),
        ({"speed": 1}, TypeError, 'route: expected a known argument, got "speed"'),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{text}"):
        make_router().build().route(**{"x": ROW, "tau": 0.5, **arguments})


def test_wrong_calls() -> None:
    snapshot = make_router().build()
    with pytest.raises(TypeError, match=r"^tau: expected a value, got nothing"):
        snapshot.route(ROW)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^x: expected one value, got two"):
        snapshot.route(ROW, 0.5, x=ROW)  # type: ignore[call-overload]
    without = random_router(np.random.default_rng(9), dim=8, hidden=0).build()
    with pytest.raises(ValueError, match=r'^mode: expected "dual" \(the checkpoint has no policy\), got "policy"'):
        without.route(ROW, 0.5, "policy")
    with pytest.raises(ValueError, match=r"^mode: expected a mode with a Path"):
        make_router(policy=None).build().choose_path(ROW, "policy")


def test_wrong_snapshots_name_what_is_wrong() -> None:
    router = random_router(np.random.default_rng(10), dim=8, width=6, candidates=4, hidden=5)
    assert router.build(version=12).version == 12
    for name, tensor in router.tensors.items():
        bad = tensor.copy()
        bad.flat[-1] = np.nan
        changes: list[tuple[type[Exception], Any]] = [
            (TypeError, tensor.astype(np.float64)),
            (ValueError, bad),
            (ValueError, tensor[..., None]),
        ]
        # the projection's input may have any width
        if name != "projection.w1":
            changes.append((ValueError, np.concatenate([tensor, tensor])))
        for error, change in changes:
            named = name if change.shape == tensor.shape else ""
            with pytest.raises(error, match=rf'^tensors\["{named}'):
                router.build(tensors={**router.tensors, name: change})
        fewer = {key: value for key, value in router.tensors.items() if key != name}
        with pytest.raises((TypeError, ValueError), match=r"^(tensors|head|policy|default_mode)"):
            router.build(tensors=fewer)
    with pytest.raises(ValueError, match=r'^tensors: expected names of a checkpoint, got "encoder.table"'):
        router.build(tensors={**router.tensors, "encoder.table": np.zeros(3, np.float32)})
    wrong: dict[str, list[Any]] = {
        "link": ["tanh", None],
        "head": ["fixed", None],
        "kappa": [-1.0, float("nan"), "1"],
        "gamma": [0.0, float("inf"), None],
        "price_usd": [np.ones(3, np.float32), np.ones(4), -np.ones(4, np.float32), np.full(4, np.nan, np.float32)],
        "cost_unit_usd": [0.0, -1.0],
        "key": [-1, 2**64, 0.5],
        "default_mode": ["both", None],
        "dual": [None, 3],
        "policy": [3],
        "encoder": [3],
        "version": ["a"],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises((TypeError, ValueError), match=f"^{name}: expected .*, got "):
                router.build(**{name: value})


def test_wrong_paths() -> None:
    table = vars(make_router().dual)
    _core.Path(**table)
    codes = np.full(1001, 17, np.int32)
    wrong = {
        "parameter": [np.zeros(0, np.float32), np.array([0.5, 1.5], np.float32), np.zeros(2)],
        "certified": [codes, -codes, codes[:1000], codes.astype(np.int64)],
        "calibrated": [codes],
        "certified_max": [-2, 1001, 0.5],
        "calibrated_max": [1001],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises((TypeError, ValueError), match=f"^{name}: expected .*, got "):
                _core.Path(**{**table, name: value})
