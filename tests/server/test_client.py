"""The client: what it sends, what it gives back, and which exception each refusal is."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proteus_fast import QueueFullError, Router
from proteus_server import app
from proteus_server.client import Client, Decision, Status


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Client]:
    with Client(address, timeout_s=20.0) as connected:
        yield connected


def test_a_text(client: Client, router: Router) -> None:
    mine, theirs = (
        client.route("Which gas do plants take in?", tau=0.5),
        router.route("Which gas do plants take in?", 0.5),
    )
    assert isinstance(mine, Decision)
    for name in ("candidate", "choice", "mu", "score", "status", "certified_floor", "tau_max", "fallbacks"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert mine.status is Status.FEASIBLE
    assert mine.versions.router == router.versions["router"]
    assert mine.timings.decide_ns > 0


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, ">f4", list])
def test_an_embedding_of_any_kind(client: Client, router: Router, kind: Any) -> None:
    x = router.encode(["a query"])[0].astype(np.float16)
    given = x.tolist() if kind is list else x.astype(kind)
    expected = router.route_batch(x[None].astype(np.float32), 0.5)
    assert client.route(embedding=given, tau=0.5).choice == expected.choice[0]


def test_a_batch(client: Client, router: Router) -> None:
    x = np.random.default_rng(0).standard_normal((300, router.input_dim))
    tau = np.linspace(0.0, 1.0, 300)
    mine, theirs = client.route_batch(embeddings=x, tau=tau), router.route_batch(x.astype(np.float32), tau)
    np.testing.assert_array_equal(mine.choice, theirs.choice)
    np.testing.assert_array_equal(mine.mu, theirs.mu)
    np.testing.assert_array_equal(mine.score, theirs.score)
    np.testing.assert_array_equal(mine.status, theirs.status)
    np.testing.assert_array_equal(mine.certified_floor.astype(np.float32), theirs.certified_floor)
    kinds = [mine.choice.dtype, mine.mu.dtype, mine.score.dtype, mine.status.dtype, mine.certified_floor.dtype]
    assert kinds == [np.int32, np.float32, np.float32, np.uint8, np.float64]
    assert mine.candidates == tuple(router.pool.names)


def test_a_batch_of_texts(client: Client, router: Router) -> None:
    answer = client.route_batch(["a", "b", "c"], tau=[0.5, math.nan, 2.0])
    assert answer.choice[0] == router.route("a", 0.5).choice
    assert answer.choice[1:].tolist() == [-1, -1]
    assert answer.status[1:].tolist() == [Status.INVALID] * 2


def test_options(client: Client, router: Router) -> None:
    name = router.pool.names[-1]
    one = client.route("q", tau=0.5, available=[name], mode="dual", guarantee="calibrated")
    assert (one.candidate, one.status, one.certified_floor, one.fallbacks) == (name, Status.UNCERTIFIED, None, ())
    many = client.route_batch(["q"] * 2, tau=0.5, available=[name], mode="dual", guarantee="calibrated")
    assert many.choice.tolist() == [len(router.pool) - 1] * 2


def test_info_and_health(client: Client, router: Router) -> None:
    info = client.info()
    assert info.candidates == tuple(router.pool.names)
    assert info.price_usd == tuple(candidate.price_usd for candidate in router.pool)
    assert (info.input_dim, info.default_mode, info.tau_max) == (router.input_dim, router.mode, router.tau_max)
    assert (info.delta, info.calibration_rows) == (router.certificate.delta, router.certificate.n)
    assert info.limits.batch_rows == 65_536
    assert client.healthy()


REFUSED: list[tuple[str, Callable[[Client], object], type[Exception], str]] = [
    ("tau above 1", lambda c: c.route("q", tau=1.5), ValueError, r"tau: expected a number in \[0, 1\], got 1.5"),
    ("tau nan", lambda c: c.route("q", tau=math.nan), ValueError, r"tau: expected a number in \[0, 1\], got nan"),
    ("no input", lambda c: c.route(tau=0.5), ValueError, "text: expected text or embedding, got neither"),
    ("two inputs", lambda c: c.route("q", embedding=[1.0], tau=0.5), ValueError, "text: expected .* got both"),
    ("short", lambda c: c.route(embedding=[1.0], tau=0.5), ValueError, "embedding: expected .* bytes .* got 4"),
    ("2-D", lambda c: c.route(embedding=[[1.0]], tau=0.5), ValueError, "embedding: expected 1 dimension"),
    ("complex", lambda c: c.route(embedding=[1j], tau=0.5), ValueError, "embedding: .* got 1 of complex128"),
    ("strings", lambda c: c.route(embedding=["a"], tau=0.5), ValueError, "embedding: expected 1 dimension"),
    (
        "mode",
        lambda c: c.route("q", tau=0.5, mode="fast"),
        ValueError,
        "mode: expected None . dual . policy, got 'fast'",
    ),
    ("guarantee", lambda c: c.route("q", tau=0.5, guarantee="x"), ValueError, "guarantee: expected .* got 'x'"),
    ("unknown", lambda c: c.route("q", tau=0.5, available=["x"]), ValueError, r"available\[0\]: expected a candidate"),
    (
        "strict",
        lambda c: c.route("q", tau=1.0, strict=True),
        ValueError,
        r"tau: expected at most .* \(tau_max\), got 1",
    ),
    ("no tau", lambda c: c.route("q", tau=None), ValueError, "tau: expected a number"),  # type: ignore[arg-type]
    ("tau text", lambda c: c.route("q", tau="high"), TypeError, "."),  # type: ignore[arg-type]
    ("too large", lambda c: c.route("x" * (9 << 20), tau=0.5), ValueError, "request: .* larger than max"),
    ("surrogate", lambda c: c.route("\ud800", tau=0.5), ValueError, "."),
    ("bytes", lambda c: c.route(b"\xff", tau=0.5), (ValueError, TypeError), "."),  # type: ignore
    ("batch neither", lambda c: c.route_batch(tau=0.5), ValueError, "texts: expected .* got neither"),
    (
        "batch both",
        lambda c: c.route_batch(["q"], embeddings=[[1.0]], tau=0.5),
        ValueError,
        "texts: expected .* got both",
    ),
    (
        "batch empty",
        lambda c: c.route_batch([], tau=0.5),
        ValueError,
        "texts: expected at least one, got none",
    ),
    (
        "batch of taus in two dimensions",
        lambda c: c.route_batch(["q"] * 4, tau=[[0.5] * 2] * 2),
        ValueError,
        r"tau: expected one number or shape \(B,\), got shape \(2, 2\)",
    ),
    ("time as text", lambda c: c.route("q", tau=0.5, timeout_s="1"), TypeError, "timeout_s: expected a number, got"),
    ("time as NaN", lambda c: c.info(timeout_s=math.nan), ValueError, "timeout_s: expected a number of seconds, got"),
    ("batch taus", lambda c: c.route_batch(["q"] * 3, tau=[0.5] * 2), ValueError, "tau: expected 1 or 3 values, got 2"),
    ("batch 1-D", lambda c: c.route_batch(embeddings=[1.0], tau=0.5), ValueError, "embeddings: expected 2 dimension"),
    ("batch width", lambda c: c.route_batch(embeddings=[[1.0]], tau=0.5), ValueError, "embeddings: expected .* got 4"),
    ("batch strict", lambda c: c.route_batch(["q"], tau=1.0, strict=True), ValueError, "tau: expected at most"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[0])
def test_refused(client: Client, case: Any) -> None:
    _, call, kind, text = case
    with pytest.raises(kind, match=text):
        call(client)
    assert client.healthy()


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, math.nan])
def test_a_timeout_is_more_than_nothing(timeout_s: float) -> None:
    with pytest.raises(ValueError, match="timeout_s: expected "):
        Client("127.0.0.1:1", timeout_s)


@pytest.mark.parametrize("timeout_s", [math.inf, 1e20, 10**30, np.float32(5.0)])
def test_a_timeout_may_be_none_at_all(address: str, timeout_s: float) -> None:
    with Client(address, timeout_s) as client:
        assert client.healthy()
        assert client.healthy(timeout_s=timeout_s)
        assert client.route("q", tau=0.5, timeout_s=timeout_s, available=None).candidate
        assert len(client.route_batch((text for text in ("a", "b")), tau=0.5).choice) == 2  # type: ignore[arg-type]


def test_a_closed_client_says_so(address: str) -> None:
    client = Client(address)
    client.close()
    client.close()
    for call in (client.healthy, client.info, lambda: client.route("q", tau=0.5)):
        with pytest.raises(RuntimeError, match=r"^client: closed$"):
            call()


def test_overload_is_queue_full(held_server: Any) -> None:
    server, wire, batcher = held_server(workers=1, max_queue=1)
    batcher.gate.clear()
    with Client(wire.address) as client:
        waiting = [threading.Thread(target=lambda: client.route("q", tau=0.5, timeout_s=20.0)) for _ in range(2)]
        for thread in waiting:
            thread.start()
        while server.pending < 2:
            time.sleep(0.001)
        with pytest.raises(QueueFullError):
            client.route("q", tau=0.5)
        assert client.healthy()
        batcher.gate.set()
        for thread in waiting:
            thread.join()


def test_every_call_has_a_deadline(held_server: Any) -> None:
    _, wire, batcher = held_server()
    batcher.gate.clear()
    with Client(wire.address, timeout_s=0.1) as client:
        start = time.perf_counter()
        with pytest.raises(TimeoutError):
            client.route("q", tau=0.5)
        with pytest.raises(TimeoutError):
            client.route_batch(["q"], tau=0.5, timeout_s=0.05)
        assert time.perf_counter() - start < 5.0


def test_a_mistake_of_the_server_has_a_reference(held_server: Any) -> None:
    _, wire, batcher = held_server()
    batcher.failure = KeyError("secret")
    with (
        Client(wire.address) as client,
        pytest.raises(RuntimeError, match=r"INTERNAL: internal error, reference [0-9a-f]{16}$"),
    ):
        client.route("q", tau=0.5)


def test_no_time_is_not_the_client_s_own(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    check = client._check

    def spy(request: Any, *, timeout: float) -> Any:
        seen.append(timeout)
        return check(request, timeout=timeout)

    monkeypatch.setattr(client, "_check", spy)
    client.healthy(timeout_s=0.0)
    assert client.healthy(timeout_s=5.0)
    assert client.healthy()
    assert seen == [0.0, 5.0, 20.0]


def test_no_server_is_a_connection_error(socket_dir: Path) -> None:
    with Client(f"unix:{socket_dir}/none") as client:
        assert not client.healthy()
        with pytest.raises(ConnectionError):
            client.route("q", tau=0.5)


def test_a_client_outlives_its_server(router: Router, socket_dir: Path) -> None:
    place = f"unix:{socket_dir}/s"
    with Client(place, timeout_s=5.0) as client:
        for _ in range(3):
            with app.Server(router, place).running():
                deadline = time.monotonic() + 10.0
                while not client.healthy():
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
                assert client.route("q", tau=0.5).candidate
            with pytest.raises(ConnectionError):
                client.route("q", tau=0.5)


def test_one_client_in_many_threads(client: Client, router: Router) -> None:
    texts = [f"query {i}" for i in range(40)]
    expected = [router.route(text, 0.5).choice for text in texts]
    wrong = []

    def work() -> None:
        wrong.extend(
            text for text, choice in zip(texts, expected, strict=True) if client.route(text, tau=0.5).choice != choice
        )

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_client_brings_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nimport proteus_server.client\n"
        "assert not {'torch', 'safetensors', 'proteus_fast.router'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
