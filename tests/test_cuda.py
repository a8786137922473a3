"""Routers on CUDA tensors: the kernels' answers are the CPU's for the embedded router, and the operator for
torch.compile. Without a GPU the kernels run in Triton's interpreter and the public entry is tested up to its door."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch

import proteus_fast as pf
from proteus_fast import cuda
from proteus_fast.demo_queries import queries
from proteus_fast.router import Router, by_number
from proteus_kernels.snapshot import Snapshot
from tests.kernels.conftest import gpu_arithmetic  # noqa: F401
from tests.kernels.snapshots import DEVICE, on_device

ROWS = 48


@pytest.fixture(scope="module")
def router() -> Router:
    return Router.load()


@pytest.fixture(scope="module")
def snapshot(router: Router) -> Snapshot:
    return cuda.build_snapshot(router.checkpoint, DEVICE, "float32")


@pytest.fixture(scope="module")
def x(router: Router) -> np.ndarray:
    return router.encode(queries()[:ROWS])


def assert_equal(router: Router, snapshot: Snapshot, x: np.ndarray, tau: Any, **options: Any) -> None:
    cpu = router.route_batch(x, tau, **options)
    given = {name: on_device(value) for name, value in options.items()}
    target = on_device(tau) if isinstance(tau, np.ndarray) else tau
    gpu = cuda.decide(snapshot, on_device(x), target, **given)
    np.testing.assert_array_equal(gpu.status.cpu().numpy(), cpu.status)
    np.testing.assert_array_equal(gpu.certified_floor.cpu().numpy(), cpu.certified_floor)
    np.testing.assert_allclose(gpu.mu.cpu().numpy(), cpu.mu, rtol=0, atol=1e-5)
    np.testing.assert_allclose(gpu.score.cpu().numpy(), cpu.score, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(gpu.choice.cpu().numpy(), cpu.choice)


def test_the_embedded_router_chooses_as_on_the_cpu(router: Router, snapshot: Snapshot, x: np.ndarray) -> None:
    """Every argument, on real encodings: choice, status and floor are equal row by row."""
    rng = np.random.default_rng(0)
    k = len(router.pool)
    tau_max = router.tau_max
    assert tau_max is not None
    cases: list[tuple[Any, dict[str, Any]]] = [
        (0.8, {}),
        (tau_max, {}),
        (1.0, {}),
        (1, {}),
        (np.float32(0.85), {}),
        (rng.uniform(0.7, 0.95, ROWS), {}),
        (np.array([0.8, np.nan, 1.5, *[0.9] * (ROWS - 3)], np.float32), {}),
        (0.8, {"mode": "dual"}),
        (0.8, {"mode": "policy"}),
        (0.8, {"guarantee": "calibrated"}),
        (0.8, {"available": np.arange(k) > 3}),
        (0.8, {"available": rng.random((ROWS, k)) < 0.5}),
        (0.8, {"price_usd": router.pool.price_usd[::-1].copy()}),
        (0.8, {"price_usd": rng.random((ROWS, k)).astype(np.float32) / 1000}),
        (0.8, {"ids": rng.integers(0, 2**64, ROWS, dtype=np.uint64)}),
        (0.8, {"sample": True, "seed": 2**63 + 11}),
    ]
    for tau, options in cases:
        assert_equal(router, snapshot, x, tau, **options)


def test_hidden_states_have_the_cpus_bits(router: Router, snapshot: Snapshot, x: np.ndarray) -> None:
    hidden = np.stack([x, x * 0.5, np.full_like(x, np.nan), x * 1.7, x * x], axis=1)
    mask = np.tile(np.array([1, 1, 0, 1, 1], np.int64), (len(x), 1))
    for rows in (len(x), 1):
        assert_equal(router, snapshot, hidden[:rows], 0.83, mask=mask[:rows])
    half = torch.from_numpy(hidden).bfloat16()
    cpu = router.route_batch(half, 0.83, mask=torch.from_numpy(mask))
    gpu = cuda.decide(snapshot, half.to(DEVICE), 0.83, mask=on_device(mask))
    np.testing.assert_array_equal(gpu.choice.cpu().numpy(), cpu.choice.numpy())


def test_rounded_products_are_uncertified_and_near(router: Router, x: np.ndarray) -> None:
    rounded = cuda.build_snapshot(router.checkpoint, DEVICE, "bfloat16")
    cpu, gpu = router.route_batch(x, 0.8), cuda.decide(rounded, on_device(x), 0.8)
    assert set(gpu.status.tolist()) == {int(pf.Status.UNCERTIFIED)}
    assert gpu.certified_floor.isnan().all()
    assert (gpu.choice.cpu().numpy() == cpu.choice).mean() > 0.9


def test_warm_up_and_capture(snapshot: Snapshot, x: np.ndarray) -> None:
    cuda.warm_up(snapshot)
    captured = cuda.capture(snapshot, 8, None, None, "certified", None)
    got, expected = captured.run(on_device(x[:8]), 0.8), cuda.decide(snapshot, on_device(x[:8]), 0.8)
    assert torch.equal(got.choice, expected.choice)
    drawn = cuda.capture(snapshot, 8, torch.float16, "policy", "certified", seed=7)
    assert drawn.state is not None
    assert drawn.state[0] == 7
    assert not torch.equal(drawn.run(on_device(x[:8]), 0.8).mu.clone(), drawn.run(on_device(x[:8]), 0.8).mu)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cpu:0", "device: expected 'cpu', 'cuda' or 'cuda:N', got 'cpu:0'"),
        ("gpu", "device: expected 'cpu', 'cuda' or 'cuda:N', got 'gpu'"),
        (7, "device: expected 'cpu', 'cuda' or 'cuda:N'|device: expected one of the"),
        ("cuda:99", "device: expected one of the [0-9]+ CUDA devices that torch sees, got 'cuda:99'"),
    ],
)
def test_wrong_devices(name: Any, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}"):
        Router.load(device=name)
    with pytest.raises(ValueError, match=f"^{text}"):
        Router.load().capture(4, device=name)


def test_wrong_precision() -> None:
    with pytest.raises(ValueError, match=r"^precision: expected 'float32' or 'bfloat16', got 'int8'"):
        Router.load(precision="int8")


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"tau": [0.8] * ROWS}, TypeError, "tau: expected a number or a tensor on .*, got list"),
        ({"tau": np.full(ROWS, 0.8)}, TypeError, "tau: expected a number or a tensor on .*, got ndarray"),
        ({"tau": True}, TypeError, "tau: expected a number or a tensor"),
        ({"sample": True, "seed": -1}, ValueError, "seed: expected an int from 0 to 18446744073709551615, got -1"),
        ({"sample": True, "seed": 2**64}, ValueError, "seed: expected an int from 0"),
        ({"sample": True, "seed": 0.5}, TypeError, "seed: expected an int or a tensor of seed and offset, got float"),
        ({"available": [True]}, TypeError, "available: expected a tensor on .*, got list"),
    ],
)
def test_wrong_arguments(
    snapshot: Snapshot, x: np.ndarray, arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"^{text}"):
        cuda.decide(snapshot, on_device(x), **{"tau": 0.8, **arguments})


def test_compiled_graphs_hold_one_call(router: Router, x: np.ndarray) -> None:
    """fullgraph: tracing breaks nowhere. The operator runs on either device; here on the CPU."""
    rows = torch.from_numpy(x)

    def route(rows: torch.Tensor, tau: Any, **options: Any) -> Any:
        choice, mu, score = router.route_batch(rows * 1.0, tau, **options)
        return choice + 1, mu, score

    compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
    k = len(router.pool)
    cases: list[tuple[Any, dict[str, Any]]] = [
        (0.8, {}),
        (torch.full((ROWS,), 0.85), {}),
        (0.8, {"available": torch.arange(k) > 3, "mode": "dual"}),
        (0.8, {"price_usd": torch.rand(ROWS, k), "guarantee": "calibrated"}),
        (0.8, {"sample": True, "seed": 2**64 - 1, "mode": "policy"}),
    ]
    for tau, options in cases:
        for got, expected in zip(compiled(rows, tau, **options), route(rows, tau, **options), strict=True):
            assert torch.equal(got, expected)
    with pytest.raises(ValueError, match=r"^tau: expected at most .*, got 1 at row 0"):
        compiled(rows, 1.0, strict=True)
    # what the plain call refuses is refused while it is traced
    for wrong, text in (
        ({"tau": True}, "tau: expected a number or a tensor on cpu, got bool"),
        ({"tau": 0.5, "sample": True, "seed": (1 << 64) + 5}, "seed: expected an int from 0 to"),
    ):
        with pytest.raises(torch._dynamo.exc.Unsupported, match=text):
            compiled(rows, **wrong)
    inside = compiled(rows[:3], 0.8)
    assert torch.equal(inside[0], route(rows[:3], 0.8)[0])


def test_the_operator_keeps_torchs_rules(router: Router, x: np.ndarray) -> None:
    rows = torch.from_numpy(x[:4])
    arguments = (rows, None, 0.8, None, None, None, None, None, "certified", None, 0, False, False, router.number)
    torch.library.opcheck(torch.ops.proteus_fast.route_batch.default, arguments)


def test_a_router_is_not_kept_alive_by_its_number() -> None:
    number = Router.load().number
    gc.collect()
    assert number not in by_number
