"""The router from Python: kinds of arrays, statuses, bad input, agreement with the torch reference."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import proteus_fast as pf
from proteus_fast import checkpoint
from proteus_fast.certificate import MIXING_STEPS, Status
from proteus_fast.demo_queries import queries
from proteus_fast.router import EMBEDDED, Router
from proteus_kernels import reference
from tests.checkpoints import tiny_checkpoint


@pytest.fixture(scope="module")
def router() -> Router:
    return Router.load()


@pytest.fixture(scope="module")
def x(router: Router) -> np.ndarray:
    return router.encode(queries())


@pytest.fixture(scope="module")
def plain(router: Router) -> Router:
    """The same router without its policy."""
    source = router.checkpoint
    config = replace(source.config, head=None, mode="dual")
    tensors = {name: tensor for name, tensor in source.tensors.items() if not name.startswith("policy.")}
    evidence = source.certificate
    paths, tables = {"dual": evidence.paths["dual"]}, {"dual": evidence.tables["dual"]}
    return Router(checkpoint.Checkpoint(config, tensors, replace(evidence, paths=paths, tables=tables)))


@pytest.mark.parametrize("mode", ["dual", "policy"])
def test_answers_are_those_of_the_reference(router: Router, x: np.ndarray, mode: Any) -> None:
    """Through the whole chain: table look-up, mixing side, prediction, score, argmax."""
    source = router.checkpoint
    tensors = {name: torch.from_numpy(t).double() for name, t in source.tensors.items() if "encoder" not in name}
    c = torch.from_numpy(router.pool.price_usd / source.config.cost_unit_usd)
    p = reference.predict_ref(torch.from_numpy(x).double(), tensors, source.config.link)
    u = reference.row_hash_ref(torch.from_numpy(x), router.certificate.key)
    path = router.certificate.paths[mode].path
    table = router.certificate.tables[mode]["certified"]
    prior = tensors["policy.prior"] if mode == "policy" else torch.zeros(len(c)).double()
    for tau in (0.0, 0.72, 0.8, 0.8301, 0.86, 0.95, 1.0):
        code = torch.full((len(x),), int(table.code[pf.certificate.tau_index(tau)]), dtype=torch.int32)
        vertex = reference.mixing_side_ref(u, code)
        mu = torch.from_numpy(path.parameter)[vertex].double()
        if mode == "policy":
            mu = reference.policy_ref(torch.from_numpy(x).double(), mu, tensors, source.config.head or "").mu
        scores = reference.scores_ref(p, mu, prior, c, source.config.kappa, source.config.gamma)
        choice, best = reference.best_candidate_ref(scores)
        batch = router.route_batch(x, tau, mode=mode)
        top = scores.topk(2, dim=1).values
        clear = (top[:, 0] - top[:, 1] > 2e-5).numpy()
        assert np.abs(batch.mu - mu.float().numpy()).max() <= (1e-5 if mode == "policy" else 0.0)
        assert np.array_equal(batch.choice[clear], choice.numpy()[clear])
        assert np.abs(batch.score - best.numpy()).max() <= 1e-5
        assert clear.mean() > 0.99


def test_mixing_serves_the_share_that_the_code_says(plain: Router) -> None:
    table = plain.certificate.tables["dual"]["certified"]
    index = next(i for i in range(800, table.max_index) if table.code[i] % MIXING_STEPS not in (0, 1, 15))
    x = np.random.default_rng(0).standard_normal((20_000, plain.input_dim)).astype(np.float32)
    mu = plain.route_batch(x, index / 1000).mu
    vertex, share = divmod(int(table.code[index]), MIXING_STEPS)
    parameter = plain.certificate.paths["dual"].path.parameter
    assert set(np.unique(mu)) == {parameter[vertex], parameter[vertex + 1]}
    assert abs((mu == parameter[vertex + 1]).mean() - share / MIXING_STEPS) < 0.015
    ids = np.arange(20_000, dtype=np.uint64)
    by_id = plain.route_batch(x, index / 1000, ids=ids)
    assert not np.array_equal(by_id.mu, mu)
    assert np.array_equal(by_id.mu, plain.route_batch(x[::-1].copy(), index / 1000, ids=ids[::-1].copy()).mu[::-1])


def test_kinds_of_arrays_come_back(router: Router, x: np.ndarray) -> None:
    expected = router.route_batch(x, 0.85)
    for made in (torch.from_numpy(x), torch.from_numpy(x).requires_grad_(), torch.from_numpy(x.astype(np.float64))):
        batch = router.route_batch(made, 0.85)
        for name in ("choice", "mu", "score", "status", "certified_floor"):
            assert isinstance(getattr(batch, name), torch.Tensor)
            assert np.array_equal(getattr(batch, name).numpy(), getattr(expected, name), equal_nan=True)
    choice, mu, score = router.route_batch(torch.from_numpy(x), torch.full((len(x),), 0.85))
    assert choice.dtype == torch.int32
    assert mu.dtype == score.dtype == torch.float32
    assert np.array_equal(choice.numpy(), expected.choice)
    bfloat = router.route_batch(torch.from_numpy(x).bfloat16(), 0.85)
    assert np.array_equal(
        bfloat.choice.numpy(), router.route_batch(torch.from_numpy(x).bfloat16().float().numpy(), 0.85).choice
    )
    half = x.astype(np.float16)
    assert np.array_equal(
        router.route_batch(half, 0.85).choice, router.route_batch(half.astype(np.float32), 0.85).choice
    )


def test_dlpack_producers_are_taken(router: Router, x: np.ndarray) -> None:
    class Producer:
        def __dlpack__(self, **options: Any) -> Any:
            return x.__dlpack__(**options)

        def __dlpack_device__(self) -> tuple[Any, int]:
            return x.__dlpack_device__()

    assert np.array_equal(router.route_batch(Producer(), 0.85).choice, router.route_batch(x, 0.85).choice)


def test_layouts_and_hidden_states(router: Router, x: np.ndarray) -> None:
    expected = router.route_batch(x, 0.85).choice
    assert np.array_equal(router.route_batch(np.asfortranarray(x), 0.85).choice, expected)
    assert np.array_equal(router.route_batch(np.repeat(x, 2, axis=0)[::2], 0.85).choice, expected)
    hidden = np.stack([x, x, np.full_like(x, np.nan)], axis=1)
    mask = np.tile([2, 1, 0], (len(x), 1))
    assert np.array_equal(router.route_batch(hidden, 0.85, mask=mask).choice, expected)
    pooled = reference.masked_mean_ref(torch.from_numpy(hidden), torch.from_numpy(mask)).numpy()
    assert np.array_equal(router.route_batch(pooled, 0.85).choice, expected)


def test_batch_equals_singles(router: Router, x: np.ndarray) -> None:
    tau = np.linspace(0.7, 0.9, len(x))
    batch = router.route_batch(x, tau)
    for i in range(len(x)):
        single = router.route_batch(x[i : i + 1], float(tau[i]))
        assert (single.choice[0], single.mu[0], single.score[0], single.status[0]) == (
            batch.choice[i], batch.mu[i], batch.score[i], batch.status[i])  # fmt: skip


def test_statuses(router: Router, x: np.ndarray) -> None:
    tau_max = router.tau_max
    assert tau_max is not None
    names = router.pool.names
    everyone = np.ones(len(names), bool)
    all_but_one = everyone.copy()
    all_but_one[0] = False
    cases: list[tuple[dict[str, Any], float, Status, float]] = [
        ({}, 0.8, Status.FEASIBLE, 0.8),
        ({}, 0.80001, Status.FEASIBLE, 0.801),
        ({}, tau_max, Status.FEASIBLE, tau_max),
        ({}, tau_max + 0.001, Status.INFEASIBLE, tau_max),
        ({}, 1.0, Status.INFEASIBLE, tau_max),
        ({"available": everyone}, 0.8, Status.FEASIBLE, 0.8),
        ({"available": all_but_one}, 0.8, Status.UNCERTIFIED, np.nan),
        ({"price_usd": router.pool.price_usd}, 0.8, Status.UNCERTIFIED, np.nan),
        ({"guarantee": "calibrated"}, 0.8, Status.UNCERTIFIED, np.nan),
        ({"guarantee": "calibrated"}, 1.0, Status.INFEASIBLE, np.nan),
        ({"guarantee": "calibrated", "available": all_but_one}, 1.0, Status.UNCERTIFIED, np.nan),
        ({"ids": np.arange(len(x), dtype=np.uint64)}, 0.8, Status.UNCERTIFIED, np.nan),
        ({"mode": router.mode}, 0.8, Status.FEASIBLE, 0.8),
        ({"mode": "dual"}, 0.8, Status.UNCERTIFIED, np.nan),
    ]
    for options, tau, status, floor in cases:
        batch = router.route_batch(x, tau, **options)
        assert set(batch.status) == {status}, (options, tau)
        assert np.allclose(batch.certified_floor, floor, atol=1e-6, equal_nan=True), (options, tau)
    calibrated = router.certificate.tau_max(router.mode, "calibrated")
    assert calibrated is not None
    assert calibrated > tau_max


def test_values_inside_arrays_spoil_their_own_row_only(router: Router, x: np.ndarray) -> None:
    clean = router.route_batch(x[:8], 0.85)
    spoilt = x[:8].copy()
    spoilt[1, 3], spoilt[2, 0] = np.nan, np.inf
    tau = np.full(8, 0.85)
    tau[3], tau[4], tau[5] = np.nan, 1.0000001, -1e-9
    available = np.ones((8, len(router.pool)), bool)
    available[6] = False
    batch = router.route_batch(spoilt, tau, available=available)
    assert list(batch.status) == [1, 4, 4, 4, 4, 4, 4, 1]
    assert list(batch.choice == -1) == [False, *[True] * 6, False]
    assert np.isnan(batch.mu[1:7]).all()
    assert np.isnan(batch.score[1:7]).all()
    assert np.isnan(batch.certified_floor[1:7]).all()
    assert batch.choice[0] == clean.choice[0]
    assert batch.choice[7] == clean.choice[7]
    price = np.tile(router.pool.price_usd, (8, 1))
    price[2, 1], price[3, 1], price[4, 1] = -1.0, np.inf, np.nan
    assert list(router.route_batch(x[:8], 0.85, price_usd=price).status) == [3, 3, 4, 4, 4, 3, 3, 3]


D, K = 79, 14
Z = np.zeros((4, D), np.float32)

BAD_CALLS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("tau NaN", {"tau": float("nan")}, ValueError, "tau: expected"),
    ("tau infinite", {"tau": float("inf")}, ValueError, "tau: expected"),
    ("tau above 1", {"tau": 1.0000001}, ValueError, "tau: expected"),
    ("tau below 0", {"tau": -0.001}, ValueError, "tau: expected"),
    ("tau 2", {"tau": 2}, ValueError, "tau: expected"),
    ("tau text", {"tau": "0.9"}, TypeError, "tau: expected"),
    ("tau None", {"tau": None}, TypeError, "tau: expected"),
    ("tau list of texts", {"tau": ["0.9"] * 4}, TypeError, "tau: expected"),
    ("tau list too short", {"tau": [0.9] * 3}, ValueError, "tau: expected"),
    ("tau True", {"tau": True}, TypeError, "tau: expected"),
    ("tau complex", {"tau": 1j}, TypeError, "tau: expected"),
    ("tau of integers", {"tau": np.ones(4, np.int64)}, TypeError, "tau: expected a floating dtype"),
    ("tau too short", {"tau": np.full(3, 0.9)}, ValueError, "tau: expected"),
    ("tau too long", {"tau": np.full(5, 0.9)}, ValueError, "tau: expected"),
    ("tau 2-d", {"tau": np.full((4, 1), 0.9)}, ValueError, "tau: expected"),
    ("narrow", {"tensor": Z[:, :-1]}, ValueError, "tensor: expected shape"),
    ("wide", {"tensor": np.zeros((4, D + 1), np.float32)}, ValueError, "tensor: expected shape"),
    ("1-d", {"tensor": Z[0]}, ValueError, "tensor: expected shape"),
    ("0-d", {"tensor": np.float32(1.0)}, TypeError, "tensor: expected"),
    ("4-d", {"tensor": Z[None, None]}, ValueError, "tensor: expected shape"),
    ("3-d without mask", {"tensor": Z[None]}, ValueError, "mask: expected"),
    ("mask for 2-d", {"mask": np.ones((4, 1))}, ValueError, "tensor: expected hidden states"),
    ("mask of another shape", {"tensor": Z[None], "mask": np.ones((4, 1))}, ValueError, "mask: expected shape"),
    ("mask a list", {"tensor": Z[None], "mask": [[1] * 4]}, TypeError, "mask: expected"),
    ("integers", {"tensor": Z.astype(np.int32)}, TypeError, "tensor: expected a floating dtype, got int32"),
    ("booleans", {"tensor": Z.astype(bool)}, TypeError, "tensor: expected a floating dtype, got bool"),
    ("complex", {"tensor": Z.astype(np.complex64)}, TypeError, "tensor: expected a floating dtype, got complex64"),
    ("objects", {"tensor": Z.astype(object)}, TypeError, "tensor: expected a floating dtype, got object"),
    ("texts", {"tensor": np.array([["a"] * D])}, TypeError, "tensor: expected a floating dtype"),
    ("a list", {"tensor": Z.tolist()}, TypeError, "tensor: expected a NumPy array"),
    ("None", {"tensor": None}, TypeError, "tensor: expected a NumPy array"),
    ("a str", {"tensor": "hello"}, TypeError, "tensor: expected a NumPy array"),
    ("torch integers", {"tensor": torch.zeros(4, D, dtype=torch.int64)}, TypeError, "tensor: expected a floating"),
    ("torch meta device", {"tensor": torch.zeros(4, D, device="meta")}, ValueError, "tensor: expected a CPU tensor"),
    ("available too short", {"available": np.ones(K - 1, bool)}, ValueError, "available: expected"),
    ("available of another B", {"available": np.ones((3, K), bool)}, ValueError, "available: expected"),
    ("available 3-d", {"available": np.ones((4, K, 1), bool)}, ValueError, "available: expected"),
    ("available integers", {"available": np.ones(K, np.int64)}, TypeError, "available: expected"),
    ("available names", {"available": ["o1-mini"]}, TypeError, "available: expected"),
    ("prices too short", {"price_usd": np.ones(K - 1)}, ValueError, "price_usd: expected"),
    ("prices of another B", {"price_usd": np.ones((5, K))}, ValueError, "price_usd: expected"),
    ("integer prices", {"price_usd": np.ones(K, np.int64)}, TypeError, "price_usd: expected"),
    ("prices a dict", {"price_usd": {"o1": 1.0}}, TypeError, "price_usd: expected"),
    ("ids too short", {"ids": np.arange(3, dtype=np.uint64)}, ValueError, "ids: expected"),
    ("ids signed", {"ids": np.arange(4)}, TypeError, "ids: expected"),
    ("ids floats", {"ids": np.arange(4.0)}, TypeError, "ids: expected"),
    ("unknown mode", {"mode": "fast"}, ValueError, "mode: expected"),
    ("unknown guarantee", {"guarantee": "sure"}, ValueError, "guarantee: expected"),
    ("sample without seed", {"sample": True}, ValueError, "seed: expected"),
    ("sample without policy", {"sample": True, "seed": 1, "mode": "dual"}, ValueError, "sample: expected"),
    ("strict and infeasible", {"tau": 1.0, "strict": True}, ValueError, r"tau: expected at most 0\.\d+ \(tau_max\)"),
    ("strict and NaN", {"tensor": Z + np.float32(np.nan), "strict": True}, ValueError, "INVALID at row 0"),
]  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS, ids=[case[0] for case in BAD_CALLS])
def test_bad_calls_raise_by_name(router: Router, case: tuple[str, dict[str, Any], type[Exception], str]) -> None:
    _, changes, exception, message = case
    arguments: dict[str, Any] = {"tensor": Z, "tau": 0.9} | changes
    with pytest.raises(exception, match=message):
        router.route_batch(arguments.pop("tensor"), arguments.pop("tau"), **arguments)
    assert router.route_batch(Z, 0.8).status[0] == Status.FEASIBLE


def test_edges_that_are_fine(router: Router) -> None:
    empty = router.route_batch(np.zeros((0, router.input_dim), np.float32), 0.9)
    assert len(empty) == 0
    assert len(router.route_batch(np.zeros((0, router.input_dim), np.float32), np.zeros(0))) == 0
    assert router.route_batch(Z, -0.0).status[0] == Status.FEASIBLE
    assert router.route_batch(Z, 1).status[0] == Status.INFEASIBLE
    assert router.route_batch(Z, np.float32(0.85)).certified_floor[0] == np.float32(0.85)
    assert list(router.route_batch(Z, [0.8, 0.8, 1, 2.0]).status) == [1, 1, 2, 4]
    assert router.encode([]).shape == (0, router.input_dim)
    large = router.route_batch(np.zeros((1_000_000, router.input_dim), np.float32), 0.8)
    assert np.all(large.choice == large.choice[0])


BAD_TEXTS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("tau NaN", {"tau": float("nan")}, ValueError, "tau: expected"),
    ("tau above 1", {"tau": 1.1}, ValueError, "tau: expected"),
    ("text None", {"text": None}, TypeError, "^text: expected a str"),
    ("text bytes", {"text": b"abc"}, TypeError, "^text: expected a str"),
    ("candidates as one str", {"available": "gpt-4o"}, TypeError, "available: expected a list of names, got one str"),
    ("unknown candidate", {"available": ["gpt-99"]}, ValueError, "available: expected one of"),
    ("tau None", {"tau": None}, TypeError, "tau: expected"),
    ("tau many", {"tau": [0.8, 0.9]}, TypeError, "tau: expected one number"),
    ("nobody", {"available": []}, ValueError, "available: expected at least one"),
    ("prices by name", {"price_usd": {"gpt-4": 1.0}}, TypeError, "price_usd: expected prices in the order"),
    ("negative price", {"price_usd": [-1.0] * K}, ValueError, "price_usd: expected finite values"),
    ("infinite price", {"price_usd": [float("inf")] * K}, ValueError, "price_usd: expected finite values"),
    ("two prices", {"price_usd": [1.0, 2.0]}, ValueError, "price_usd: expected"),
    ("unknown mode", {"mode": "fast"}, ValueError, "mode: expected"),
    ("strict", {"tau": 1.0, "strict": True}, ValueError, "tau: expected at most"),
    ("strict and an integer", {"tau": 1, "strict": True}, ValueError, "tau: expected at most"),
    ("strict and float32", {"tau": np.float32(0.999), "strict": True}, ValueError, "tau: expected at most"),
    ("prices that overflow", {"price_usd": [1e38] * K}, ValueError, "price_usd: expected prices that leave finite"),
]


@pytest.mark.parametrize("case", BAD_TEXTS, ids=[case[0] for case in BAD_TEXTS])
def test_bad_texts_raise_by_name(router: Router, case: tuple[str, dict[str, Any], type[Exception], str]) -> None:
    _, changes, exception, message = case
    arguments: dict[str, Any] = {"text": "What is 2 + 2?", "tau": 0.85} | changes
    with pytest.raises(exception, match=message):
        router.route(arguments.pop("text"), **arguments)


@pytest.mark.parametrize(
    "text", ["", " ", "\x00", "\ud800", "🙂" * 1000, "a" * 5_000_000, "\n" * 100_000, "é\u0301\u202e", "\ufeff"]
)
def test_any_text_is_routed(router: Router, text: str) -> None:
    decision = router.route(text, 0.85)
    assert decision.candidate in router.pool.names
    assert decision.status == Status.FEASIBLE
    with pytest.raises(TypeError, match="queries: expected a sequence"):
        router.encode(text)


def test_a_decision_says_what_it_rests_on(router: Router) -> None:
    explanation = router.explain("A train leaves at noon. When does it arrive?", 0.84)
    decision = explanation.decision
    assert decision.certified_floor == 0.84
    assert decision.tau_max == router.tau_max
    assert set(decision.fallbacks) | {decision.candidate} == set(router.pool.names)
    ordered = [decision.candidate, *decision.fallbacks]
    assert ordered == sorted(router.pool.names, key=lambda name: -explanation.scores[name])
    assert all(0.0 <= p <= 1.0 for p in explanation.predicted.values())
    only = router.route("A train leaves at noon.", 0.84, available=["gemini-1.5-pro"])
    assert (only.candidate, only.fallbacks, only.status) == ("gemini-1.5-pro", (), Status.UNCERTIFIED)


def test_feasibility_agrees_with_routing(router: Router, x: np.ndarray) -> None:
    for tau in (0.5, 0.8, 0.8765, router.tau_max, 0.99):
        assert tau is not None
        told = router.feasibility(tau)
        batch = router.route_batch(x[:1], tau)
        assert told.status == batch.status[0]
        assert told.certified_floor == pytest.approx(float(batch.certified_floor[0]), abs=1e-6)
    costs = [router.feasibility(i / 100).expected_cost_usd for i in range(100)]
    assert costs == sorted(costs)
    # a target of 0 asks for nothing, and is met where no other can be
    hopeless = Router(tiny_checkpoint(right=0))
    assert hopeless.tau_max is None
    rows = np.zeros((1, hopeless.input_dim), np.float32)
    for tau in (0.0, 0.001):
        assert hopeless.feasibility(tau).status == hopeless.route_batch(rows, tau).status[0]
    with pytest.raises(ValueError, match=r"^guarantee: expected certified or calibrated, got 'bogus'"):
        router.feasibility(0.5, "bogus")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^tau: expected"):
        router.feasibility("x")  # type: ignore[arg-type]


def test_errors_name_what_the_caller_gave(router: Router) -> None:
    with pytest.raises(TypeError, match=r"^queries\[1\]: expected a str or bytes, got int"):
        router.encode(["a", 5])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"^query: expected a str, got int"):
        router.explain(5, 0.5)  # type: ignore[arg-type]
    blind = Router(tiny_checkpoint(encoder="none"))
    with pytest.raises(ValueError, match=r"^text: expected a router with a text encoder, got one of embeddings"):
        blind.route("a text", 0.5)


def test_arrays_of_any_layout(router: Router, x: np.ndarray) -> None:
    rows = np.ascontiguousarray(x[:40])
    mask = np.random.default_rng(1).random((40, K)) < 0.5
    mask[:, 0] = True
    ids = np.arange(40, dtype=np.uint64)
    expected = router.route_batch(rows, 0.8, available=mask, ids=ids)
    unaligned = np.frombuffer(b"x" + rows.tobytes(), np.uint8)[1:].view(np.float32).reshape(rows.shape)
    for tensor, available, numbers in (
        (np.asfortranarray(rows), np.asfortranarray(mask), np.repeat(ids, 2)[::2]),
        (unaligned, np.repeat(mask, 2, axis=1)[:, ::2], ids),
        (np.repeat(rows, 2, axis=0)[::2], mask[::-1][::-1], ids[::-1][::-1]),
    ):
        answer = router.route_batch(tensor, 0.8, available=available, ids=numbers)
        np.testing.assert_array_equal(answer.choice, expected.choice)
        np.testing.assert_array_equal(answer.score, expected.score)


def test_cheaper_for_lower_targets_on_real_queries(router: Router, x: np.ndarray) -> None:
    costs = [router.pool.price_usd[router.route_batch(x, tau).choice].mean() for tau in (0.74, 0.78, 0.82, 0.86)]
    assert costs == sorted(costs)
    assert costs[0] < 0.2 * costs[-1]


def test_use_and_the_environment(router: Router, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, x: np.ndarray) -> None:
    from proteus_fast import router as module

    monkeypatch.setattr(module, "_current", None)
    monkeypatch.setenv("PROTEUS_CHECKPOINT", str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "missing"))):
        pf.route_batch(x, 0.85)
    monkeypatch.delenv("PROTEUS_CHECKPOINT")
    choice, _, _ = pf.route_batch(x, 0.85)
    assert np.array_equal(choice, router.route_batch(x, 0.85).choice)
    router.save(tmp_path / "mine")
    mine = pf.use(tmp_path / "mine")
    assert pf.current() is mine
    assert mine.versions == router.versions | {"router": mine.versions["router"]}


def test_many_threads_get_the_same_answers(router: Router, x: np.ndarray) -> None:
    expected = router.route_batch(x, 0.85)
    wrong: list[int] = []

    def work() -> None:
        for _ in range(200):
            batch = router.route_batch(x, 0.85)
            if not (np.array_equal(batch.choice, expected.choice) and np.array_equal(batch.score, expected.score)):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_router_without_a_policy_has_one_mode(plain: Router, x: np.ndarray) -> None:
    with pytest.raises(ValueError, match="mode: expected"):
        plain.route_batch(x, 0.8, mode="policy")
    with pytest.raises(ValueError, match="sample: expected"):
        plain.route_batch(x, 0.8, sample=True, seed=1)


def test_policy_checkpoints_serve_both_modes(plain: Router, x: np.ndarray, tmp_path: Any) -> None:
    """A policy network in a checkpoint: loaded, served uncertified, equal to the module's own forward pass."""
    from proteus_fast.training.policy import PolicyNetwork

    torch.manual_seed(0)
    knots = torch.linspace(0.0, 1.0, 16)
    network = PolicyNetwork(plain.input_dim, len(plain.pool), knots, knots.clone(), 3 * knots, head="residual")
    start = network(torch.from_numpy(x), torch.full((len(x),), 0.8)).mu
    assert torch.allclose(start, torch.full_like(start, 0.8), atol=1e-5)
    with torch.no_grad():
        network.w3.normal_(0.0, 0.3)
        network.prior.normal_(0.0, 0.05)
    source = plain.checkpoint
    config = replace(source.config, head="residual")
    made = checkpoint.Checkpoint(config, dict(source.tensors) | network.tensors(), source.certificate)
    checkpoint.save(made, tmp_path / "policy")
    loaded = Router.load(tmp_path / "policy")
    batch = loaded.route_batch(x, 0.8, mode="policy")
    preference = network(torch.from_numpy(x), torch.full((len(x),), 0.8))
    assert np.abs(batch.mu - preference.mu.detach().numpy()).max() < 1e-5
    assert set(batch.status) == {Status.UNCERTIFIED}
    assert np.array_equal(loaded.route_batch(x, 0.8).choice, plain.route_batch(x, 0.8).choice)
    first = loaded.route_batch(x, 0.8, mode="policy", sample=True, seed=7)
    again = loaded.route_batch(x, 0.8, mode="policy", sample=True, seed=7)
    other = loaded.route_batch(x, 0.8, mode="policy", sample=True, seed=8)
    assert np.array_equal(first.mu, again.mu)
    assert not np.array_equal(first.mu, other.mu)
    assert EMBEDDED.is_dir()
