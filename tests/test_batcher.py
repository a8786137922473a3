"""The public batcher: a router's own answers, shared encoder batches, coroutines, cancellation, failures."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from proteus_fast import Batcher, QueueFullError, Router, _core, cuda
from proteus_fast.batcher import backend_options
from tests import encoders
from tests.checkpoints import tiny_checkpoint
from tests.kernels.snapshots import DEVICE

WORDS = [f"word{i}" for i in range(40)]
TEXTS = [" ".join(WORDS[i : i + 1 + i % 7]) for i in range(32)]


class Held:
    """The router's own encoder, which counts its calls and can be held or made to fail."""

    def __init__(self, router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
        encoder: Any = router._encoder
        self._encode = encoder.encode
        monkeypatch.setattr(encoder, "encode", self)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.batches: list[list[str]] = []
        self.failure: BaseException | None = None

    def __call__(self, texts: Any) -> Any:
        self.batches.append(list(texts))
        self.entered.release()
        assert self.gate.wait(30.0)
        if self.failure is not None:
            raise self.failure
        return self._encode(texts)


@pytest.fixture(scope="module")
def hashed() -> Router:
    return Router.load()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoders.save_router(
        encoders.make("bert", tmp_path_factory.mktemp("bert"), WORDS), tmp_path_factory.mktemp("router") / "router"
    )


@pytest.fixture(scope="module")
def transformer(folder: Path) -> Router:
    router = Router.load(folder)
    router.encode(["word1"])
    return router


@pytest.fixture(params=["hash", "transformer"])
def router(request: pytest.FixtureRequest, hashed: Router, transformer: Router) -> Router:
    return hashed if request.param == "hash" else transformer


@pytest.fixture
def held(transformer: Router, monkeypatch: pytest.MonkeyPatch) -> Held:
    return Held(transformer, monkeypatch)


def wait_for(claim: Any) -> None:
    end = time.monotonic() + 20.0
    while not claim():
        assert time.monotonic() < end
        time.sleep(0.001)


def assert_same(mine: Any, theirs: Any) -> None:
    for name in ("choice", "mu", "score", "status", "certified_floor"):
        np.testing.assert_array_equal(np.asarray(getattr(mine, name)), np.asarray(getattr(theirs, name)), err_msg=name)


@pytest.mark.parametrize("guarantee", ["certified", "calibrated"])
def test_answers_are_the_router_s(router: Router, guarantee: Any) -> None:
    some = router.pool.names[1:3]
    mask = router.pool.available(some)
    taus = np.linspace(0.0, 1.0, len(TEXTS))
    x = router.encode(TEXTS)

    async def ask(batcher: Batcher) -> None:
        for available in (None, some):
            options: dict[str, Any] = {"available": available, "guarantee": guarantee}
            mine = await asyncio.gather(*[batcher.route_async(text, 0.8, **options) for text in TEXTS])
            assert mine == [router.route(text, 0.8, **options) for text in TEXTS]
        assert_same(await batcher.route_batch_async(TEXTS, taus, guarantee=guarantee), expected)

    expected = router.route_batch(x, taus, guarantee=guarantee)
    with Batcher(router) as batcher:
        assert batcher.router is router
        assert batcher.route(TEXTS[3], 0.5) == router.route(TEXTS[3], 0.5)
        for queries in (TEXTS, tuple(TEXTS), x, torch.from_numpy(x), x.astype(np.float64)):
            assert_same(batcher.route_batch(queries, taus, guarantee=guarantee), expected)
        limited = router.route_batch(x, 0.8, available=mask)
        assert_same(batcher.route_batch(TEXTS, 0.8, available=mask), limited)
        assert isinstance(batcher.route_batch(torch.from_numpy(x), 0.8).choice, torch.Tensor)
        asyncio.run(ask(batcher))
        # another loop, the same batcher
        asyncio.run(ask(batcher))


def test_concurrent_texts_share_encoder_batches(transformer: Router, held: Held) -> None:
    expected = [transformer.route(text, 0.7) for text in TEXTS]
    held.batches.clear()
    with Batcher(transformer) as batcher, ThreadPoolExecutor(len(TEXTS)) as pool:
        held.gate.clear()
        calls = [pool.submit(batcher.route, text, 0.7) for text in TEXTS]
        wait_for(lambda: batcher.stats()["queued_rows"] == len(TEXTS) - len(held.batches[0]) if held.batches else False)
        held.gate.set()
        assert [call.result() for call in calls] == expected
        assert len(held.batches) == batcher.stats()["batches"] == 2
        assert sorted(text for batch in held.batches for text in batch) == sorted(TEXTS)
        assert batcher.times()["total"].sum() == len(TEXTS)
        assert batcher.times()["encode"].sum() == 2


def test_the_token_budget_bounds_a_batch(transformer: Router, held: Held) -> None:
    """A text of 200 bytes counts as the 20 tokens that the encoder takes at most."""
    with Batcher(transformer, token_budget=60) as batcher:
        expected = batcher.route_batch(["word1 " * 33] * 7, 0.5)
        assert [len(batch) for batch in held.batches] == [3, 3, 1]
        assert_same(expected, transformer.route_batch(transformer.encode(["word1 " * 33] * 7), 0.5))


def test_an_encoder_s_failure_is_its_batch_s(transformer: Router, held: Held) -> None:
    with Batcher(transformer) as batcher:
        held.failure = ValueError("no such secret")
        with pytest.raises(RuntimeError, match=r"^backend: expected an answer, got ValueError$") as caught:
            batcher.route("word1", 0.5)
        assert caught.value.__cause__ is held.failure
        assert caught.value.__cause__.__traceback__ is not None
        held.failure = SystemExit(3)
        with pytest.raises(RuntimeError, match=r"got SystemExit$"):
            asyncio.run(batcher.route_async("word1", 0.5))
        held.failure = None
        assert batcher.route("word1", 0.5).choice >= 0
        assert batcher.stats()["failed"] == 2


def test_what_nobody_waits_for_is_not_encoded(transformer: Router, held: Held) -> None:
    async def ask(batcher: Batcher) -> None:
        running = asyncio.ensure_future(batcher.route_async("word1", 0.5))
        await asyncio.to_thread(held.entered.acquire)
        cancelled = asyncio.ensure_future(batcher.route_async("word2", 0.5))
        late = asyncio.ensure_future(batcher.route_async("word3", 0.5, deadline_s=0.02))
        kept = asyncio.ensure_future(batcher.route_async("word4", 0.5))
        while batcher.stats()["queued_rows"] < 3:
            await asyncio.sleep(0.001)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        with pytest.raises(TimeoutError, match=r"^deadline_s: expected an answer in time, got none$"):
            await late
        held.gate.set()
        assert (await running).choice >= 0
        assert (await kept).choice >= 0
        with pytest.raises(TimeoutError, match=r"^deadline_s: expected"):
            await batcher.route_async("word5", 0.5, deadline_s=0.0)

    with Batcher(transformer) as batcher:
        held.gate.clear()
        asyncio.run(ask(batcher))
        assert held.batches == [["word1"], ["word4"]]
        assert batcher.stats()["expired"] == 3


def test_a_full_queue_refuses(transformer: Router, held: Held) -> None:
    held.gate.clear()
    with Batcher(transformer, max_queue_rows=2) as batcher, ThreadPoolExecutor(2) as pool:
        running = pool.submit(batcher.route, "word1", 0.5)
        assert held.entered.acquire(timeout=10.0)
        queued = pool.submit(batcher.route, "word2", 0.5)
        wait_for(lambda: batcher.stats()["queued_rows"] == 1)
        with pytest.raises(QueueFullError, match=r"^queue: expected at most 2 rows, got 3"):
            batcher.route_batch(TEXTS[:2], 0.5)
        held.gate.set()
        assert running.result().choice >= 0
        assert queued.result().choice >= 0


def test_what_exceeds_any_queue_is_a_mistake(router: Router) -> None:
    """A caller that tries again on QueueFullError would do so for ever."""
    with Batcher(router, max_queue_rows=2) as batcher:
        for queries in (TEXTS[:3], np.zeros((3, router.input_dim), np.float32)):
            with pytest.raises(ValueError, match=r"^queries: expected at most 2 rows \(max_queue_rows\), got 3$"):
                batcher.route_batch(queries, 0.5)
            with pytest.raises(ValueError, match=r"^queries: expected at most 2 rows"):
                asyncio.run(batcher.route_batch_async(queries, 0.5))
        assert len(batcher.route_batch(TEXTS[:2], 0.5).choice) == 2


def test_no_queries_are_answered_at_once(router: Router) -> None:
    x = np.zeros((0, router.input_dim), np.float32)
    expected = router.route_batch(x, 0.5)
    with Batcher(router) as batcher:
        for queries in ([], (), x):
            for tau in (0.5, []):
                for mine in (
                    batcher.route_batch(queries, tau),
                    asyncio.run(batcher.route_batch_async(queries, tau, strict=True)),
                ):
                    assert_same(mine, expected)
                    assert [array.dtype for array in mine] == [array.dtype for array in expected]
        assert isinstance(batcher.route_batch(torch.from_numpy(x), 0.5).choice, torch.Tensor)
        assert batcher.stats()["submitted"] == 0
        for wrong in ({"tau": 1.5}, {"tau": [0.5]}, {"mode": "fast"}, {"guarantee": "none"}):
            with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected"):
                batcher.route_batch(**{"queries": [], "tau": 0.5, **wrong})  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"^batcher: closed"):
        batcher.route_batch([], 0.5)


def test_a_text_whose_embedding_is_not_finite(transformer: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder: Any = transformer._encoder
    encode = encoder.encode

    def broken(texts: list[str]) -> Any:
        rows = encode(texts)
        rows[[text == "word1" for text in texts]] = np.nan
        return rows

    monkeypatch.setattr(encoder, "encode", broken)
    with Batcher(transformer) as batcher:
        for strict in (False, True):
            with pytest.raises(ValueError, match=r"^text: expected an embedding that leaves finite scores, got NaN"):
                batcher.route("word1", 0.5, strict=strict)
        assert (batcher.route_batch(["word1", "word2"], 0.5).choice < 0).tolist() == [True, False]


@pytest.mark.parametrize("drain", [True, False])
def test_closing_while_the_encoder_runs(transformer: Router, held: Held, drain: bool) -> None:
    held.gate.clear()
    batcher = Batcher(transformer)

    async def ask() -> tuple[Any, Any]:
        running = asyncio.ensure_future(batcher.route_async("word1", 0.5))
        await asyncio.to_thread(held.entered.acquire)
        queued = asyncio.ensure_future(batcher.route_async("word2", 0.5))
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(asyncio.to_thread(batcher.close, drain))
        await asyncio.sleep(0.05)
        assert not closing.done()
        held.gate.set()
        await closing
        return tuple(await asyncio.gather(running, queued, return_exceptions=True))

    running, queued = asyncio.run(ask())
    assert running.choice >= 0
    if drain:
        assert queued.choice >= 0
    else:
        assert (type(queued), str(queued)) == (RuntimeError, "batcher: closed")
    with pytest.raises(RuntimeError, match=r"^batcher: closed"):
        batcher.route("word1", 0.5)
    batcher.close()


def test_no_wake_up_is_lost(hashed: Router) -> None:
    """Some thousand calls of threads and of tasks on two loops at once, some of which are cancelled."""
    x = np.random.default_rng(0).standard_normal((64, hashed.input_dim)).astype(np.float32)
    expected = hashed.route_batch(x, 0.8)
    cancelled = 0

    async def ask(batcher: Batcher) -> None:
        nonlocal cancelled

        async def one(i: int) -> None:
            nonlocal cancelled
            row = i % 64
            if i % 10:
                answer = await batcher.route_batch_async(x[row : row + 1], 0.8)
                assert answer.choice[0] == expected.choice[row]
                return
            call = asyncio.ensure_future(batcher.route_batch_async(x[row : row + 1], 0.8))
            await asyncio.sleep(0)
            cancelled += call.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await call

        for first in range(0, 1500, 50):
            await asyncio.wait_for(asyncio.gather(*[one(first + i) for i in range(50)]), 30.0)

    def block(batcher: Batcher) -> None:
        for i in range(500):
            row = i % 64
            assert batcher.route_batch(x[row : row + 1], 0.8, deadline_s=30.0).choice[0] == expected.choice[row]

    with Batcher(hashed, lanes=2, max_batch_size=16) as batcher, ThreadPoolExecutor(6) as pool:
        work = [pool.submit(lambda: asyncio.run(ask(batcher))) for _ in range(2)]
        work += [pool.submit(block, batcher) for _ in range(4)]
        for part in work:
            part.result()
        stats = batcher.stats()
    assert cancelled > 0
    assert stats["submitted"] == stats["completed"] + stats["expired"] == 5000
    assert stats["failed"] == stats["rejected"] == stats["queued_rows"] == 0


def test_nothing_is_left_behind(folder: Path) -> None:
    router = Router.load(folder)
    batcher = Batcher(router)
    batcher.route("word1", 0.5)
    asyncio.run(batcher.route_async("word1", 0.5))
    seen = weakref.ref(router)
    del router, batcher
    gc.collect()
    assert seen() is None


def test_a_gpu_s_batches_are_its_own(hashed: Router) -> None:
    """The whole decision as a backend, by the kernels; in the interpreter where there is no GPU."""
    route = cuda.batch_route(hashed, cuda.build_snapshot(hashed.checkpoint, DEVICE, "float32"))
    texts = ["Which gas do plants take in?", "Prove that there are infinitely many primes."]
    taus = np.array([0.3, 0.9])
    batcher = _core.Batcher(hashed.snapshot, route=route, lanes=2)
    try:
        for mask in ((1 << 64) - 1, 0b110):
            available = np.array([mask >> i & 1 for i in range(len(hashed.pool))], np.bool_)
            expected = hashed.route_batch(hashed.encode(texts), taus, available=available)
            for given in ((texts, None), (None, hashed.encode(texts))):
                mine = batcher.route(*given, taus, available=mask)
                for name in ("choice", "status", "certified_floor"):
                    np.testing.assert_array_equal(getattr(mine, name), getattr(expected, name))
                np.testing.assert_allclose(mine.score, expected.score, atol=1e-5)
                assert mine.scores.shape == (2, 0)
    finally:
        batcher.close()


def test_the_backend_is_the_router_s(hashed: Router, transformer: Router) -> None:
    assert backend_options(hashed) == {}
    options = backend_options(transformer)
    assert {name: options[name] for name in options if name != "encode"} == {
        "max_text_tokens": 20,
        "token_budget": 1024,
        "lanes": 1,
    }
    with pytest.raises(ValueError, match=r"^device: expected"):
        Batcher(hashed, device="no such device")


def test_wrong_arguments(router: Router) -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"queries": "one text"}, TypeError, "queries: expected a list of str or embeddings, got one str"),
        ({"queries": ["a", 3]}, TypeError, r"queries\[1\]: expected a str"),
        ({"queries": np.zeros((2, 3), np.float32)}, ValueError, r"queries: expected shape \(B, \d+\), got \(2, 3\)"),
        ({"queries": np.zeros(3, np.float32)}, ValueError, r"queries: expected shape \(B, \d+\), got \(3,\)"),
        ({"queries": np.zeros((0, 3), np.float32)}, ValueError, r"queries: expected shape \(B, \d+\), got \(0, 3\)"),
        ({"queries": np.zeros((2, 3), np.int64)}, TypeError, "queries: expected a floating dtype"),
        ({"queries": 3}, TypeError, "queries: expected a NumPy array"),
        ({"tau": 1.5}, ValueError, r"tau: expected a number in \[0, 1\], got 1.5"),
        ({"tau": [0.5] * 3}, ValueError, r"tau: expected shape \(2,\)"),
        ({"available": np.ones(2, np.bool_)}, ValueError, "available: expected a bool array of shape"),
        ({"mode": "fast"}, ValueError, "mode: expected"),
        ({"deadline_s": float("nan")}, ValueError, "deadline_s: expected"),
        ({"strict": True, "tau": 1.0}, ValueError, "tau: expected at most"),
    ]
    with Batcher(router) as batcher:
        for changes, error, text in cases:
            arguments = {"queries": ["word1", "word2"], "tau": 0.5, **changes}
            with pytest.raises(error, match=f"^{text}"):
                batcher.route_batch(**arguments)
            with pytest.raises(error, match=f"^{text}"):
                asyncio.run(batcher.route_batch_async(**arguments))
        for wrong, kind, text in [
            ({"text": 3}, TypeError, "text: expected a str, got int"),
            ({"tau": [0.5]}, TypeError, "tau: expected one number, got list"),
            ({"tau": -0.1}, ValueError, "tau: expected a number"),
            ({"available": []}, ValueError, "available: expected at least one candidate, got none"),
        ]:
            with pytest.raises(kind, match=f"^{text}"):
                batcher.route(**{"text": "word1", "tau": 0.5, **wrong})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^lanes: expected at least 1, got 0"):
        Batcher(router, lanes=0)
    with pytest.raises(TypeError, match=r"^router: expected a Router, got str$"):
        Batcher("x")  # type: ignore[arg-type]


def test_a_text_that_utf8_cannot_hold_fails_alone(transformer: Router) -> None:
    with Batcher(transformer) as batcher:
        with pytest.raises(ValueError, match=r"^text: expected text that UTF-8 can hold"):
            batcher.route("\ud800", 0.5)
        with pytest.raises(ValueError, match=r"^queries\[1\]: expected text that UTF-8 can hold"):
            batcher.route_batch(["word1", "\ud800"], 0.5)
        assert batcher.stats()["submitted"] == 0


def test_texts_by_an_encoder_of_the_caller_s_own(hashed: Router) -> None:
    router = Router(tiny_checkpoint(encoder="none"))
    batches: list[list[str]] = []

    def encode(texts: list[str]) -> torch.Tensor:
        batches.append(texts)
        if "bad" in texts:
            raise KeyError("no such text")
        rows = [np.random.default_rng(len(text)).standard_normal(router.input_dim) for text in texts]
        return torch.from_numpy(np.stack(rows))

    expected = router.route_batch(encode(TEXTS), 0.8)
    with Batcher(router, encode=encode) as batcher:
        assert_same(batcher.route_batch(TEXTS, 0.8), expected)
        assert batcher.route(TEXTS[3], 0.8).choice == expected.choice[3]
        assert asyncio.run(batcher.route_async(TEXTS[4], 0.8)).choice == expected.choice[4]
        with ThreadPoolExecutor(16) as pool:
            choices = [decision.choice for decision in pool.map(lambda text: batcher.route(text, 0.8), TEXTS)]
        assert choices == expected.choice.tolist()
        assert sum(map(len, batches)) == 3 * len(TEXTS) + 2
        with pytest.raises(RuntimeError) as caught:
            batcher.route("bad", 0.8)
        assert isinstance(caught.value.__cause__, KeyError)
    with Batcher(router) as batcher, pytest.raises(ValueError, match="text: expected embeddings, got texts"):
        batcher.route("a text", 0.8)
    with pytest.raises(ValueError, match="encode: expected none for a router that encodes texts itself, got one"):
        Batcher(hashed, encode=encode)
    with pytest.raises(ValueError, match="device: expected cpu with an encode of your own, got cuda"):
        Batcher(router, encode=encode, device="cuda")
    with pytest.raises(TypeError, match="encode: expected a function, got int"):
        Batcher(router, encode=3)  # type: ignore[arg-type]


def test_what_an_own_encoder_may_return() -> None:
    router = Router(tiny_checkpoint(encoder="none"))
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((2, router.input_dim), np.float32))
    narrow = rows.to(torch.bfloat16)
    shifted = np.frombuffer(b"x" + rows.numpy().tobytes(), np.uint8)[1:].view(np.float32).reshape(2, -1)
    answers: list[tuple[Any, Any]] = [
        (narrow, router.route_batch(narrow, 0.8)),
        (rows.clone().requires_grad_(), router.route_batch(rows, 0.8)),
        (rows.T.contiguous().T, router.route_batch(rows, 0.8)),
        (shifted, router.route_batch(rows, 0.8)),
    ]
    for answer, expected in answers:
        with Batcher(router, encode=lambda _, answer=answer: answer) as batcher:
            assert_same(batcher.route_batch(["a", "b"], 0.8), expected)
    # what it returned is no argument of the callers
    for wrong, error in (
        (rows.tolist(), TypeError),
        (None, TypeError),
        (rows[:1], ValueError),
        (rows.int(), TypeError),
    ):
        with (
            Batcher(router, encode=lambda _, wrong=wrong: wrong) as batcher,
            pytest.raises(RuntimeError, match=r"^backend: expected an answer, got") as caught,
        ):
            batcher.route_batch(["a", "b"], 0.8)
        assert isinstance(caught.value.__cause__, error)
        assert str(caught.value.__cause__).startswith("encode: expected ")


def test_a_closed_batcher_lets_go_of_its_encoder() -> None:
    class Service:
        def __init__(self, router: Router) -> None:
            self.dim = router.input_dim
            self.batcher = Batcher(router, encode=self.encode)

        def encode(self, texts: list[str]) -> np.ndarray:
            return np.zeros((len(texts), self.dim), np.float32)

    service = Service(Router(tiny_checkpoint(encoder="none")))
    assert service.batcher.route("a text", 0.5).choice >= 0
    seen = weakref.ref(service)
    service.batcher.close()
    del service
    gc.collect()
    assert seen() is None


def test_deadlines_of_any_number(hashed: Router) -> None:
    with Batcher(hashed) as batcher:
        for deadline in (Decimal(5), np.float32(5.0), 5, float("inf")):
            assert batcher.route("a text", 0.5, deadline_s=deadline).choice >= 0  # type: ignore[arg-type]
            assert asyncio.run(batcher.route_async("a text", 0.5, deadline_s=deadline)).choice >= 0  # type: ignore[arg-type]
        submitted = batcher.stats()["submitted"]
        with pytest.raises(TypeError, match=r"^deadline_s: expected a number, got dict"):
            asyncio.run(batcher.route_async("a text", 0.5, deadline_s={}))  # type: ignore[arg-type]
        assert batcher.stats()["submitted"] == submitted == 8
