"""Full queues, passed deadlines, mistakes of the server itself: what a client is told, and what it is never told."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2

from proteus_fast import QueueFullError
from proteus_server import app, control, errors, service
from proteus_server import proteus_pb2 as pb
from tests.server import http2

CANARY = "canary-7f3a-the-prompt-of-a-user"
ROUTE = pb.RouteRequest(text=CANARY, tau=0.5)


def assert_overloaded(answer: Any) -> None:
    assert answer.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert answer.detail(error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 100


def test_what_exceeds_the_queue_is_refused_at_once(held_server: Any) -> None:
    server, wire, batcher = held_server(workers=1, max_queue=2)
    batcher.gate.clear()
    # one runs, two wait
    taken = [wire.start("Route", ROUTE) for _ in range(3)]
    while server.pending < 3:
        time.sleep(0.001)
    for _ in range(20):
        start = time.perf_counter()
        assert_overloaded(wire.call("Route", ROUTE))
        assert_overloaded(wire.call("RouteBatch", pb.RouteBatchRequest(texts=["q"], tau=[0.5])))
        assert time.perf_counter() - start < 1.0
        # an overloaded server is not an unhealthy one
        assert wire.health() == health_pb2.HealthCheckResponse.SERVING
    batcher.gate.set()
    assert all(pb.RouteReply.FromString(call.result(timeout=10.0)).candidate for call in taken)
    assert wire.works()
    # the server's own check, those taken, and works(): nothing else was computed
    assert batcher.calls == 1 + 3 + 1


def test_more_streams_than_any_limit_leave_the_server_working(held_server: Any) -> None:
    server, wire, batcher = held_server(workers=1, max_queue=4)
    batcher.gate.clear()
    calls = [wire.start("Route", ROUTE) for _ in range(600)]
    deadline = time.monotonic() + 20.0
    while sum(call.done() for call in calls) < 595 and time.monotonic() < deadline:
        time.sleep(0.01)
    batcher.gate.set()
    codes = [call.code() for call in calls]
    assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert codes.count(grpc.StatusCode.OK) == 5
    assert wire.works()
    assert server.pending == 0


def test_the_batcher_s_full_queue_is_the_same_refusal(held_server: Any) -> None:
    _, wire, batcher = held_server()
    batcher.failure = QueueFullError(CANARY)
    answer = wire.call("Route", ROUTE)
    assert_overloaded(answer)
    assert CANARY not in answer.text + answer.metadata


def test_a_full_queue_of_rows_is_refused(held_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_BATCH_ROWS", 64)
    _, wire, _ = held_server(max_batch_size=8, workers=4)
    answers = []

    def load() -> None:
        # one batch at work and one in the queue leave no place for a third
        for _ in range(40):
            answers.append(wire.call("RouteBatch", pb.RouteBatchRequest(texts=["q " * 2000] * 60, tau=[0.5])))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [answer for answer in answers if answer.code is not grpc.StatusCode.OK]
    assert 0 < len(refused) < len(answers)
    for answer in refused:
        assert_overloaded(answer)
    assert wire.works()


def test_a_passed_deadline_costs_no_decision(held_server: Any) -> None:
    server, wire, batcher = held_server(workers=1)
    batcher.gate.clear()
    first = wire.start("Route", ROUTE)
    assert batcher.entered.acquire(timeout=10.0)
    # these wait behind the first one until their time is over
    late = [wire.start("Route", ROUTE, timeout=0.05) for _ in range(10)]
    assert {call.code() for call in late} == {grpc.StatusCode.DEADLINE_EXCEEDED}
    batcher.gate.set()
    assert first.result(timeout=10.0)
    while server.pending:
        time.sleep(0.001)
    assert batcher.calls == 2
    assert wire.works()


def test_the_batcher_is_given_the_time_that_is_left(held_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, wire, batcher = held_server()
    seen = []
    inner = batcher._batcher

    class Spy:
        def route(self, *arguments: Any, **options: Any) -> Any:
            seen.append(options["deadline_s"])
            return inner.route(*arguments, **options)

        def close(self, drain: bool = True) -> None:
            inner.close(drain)

    monkeypatch.setattr(batcher, "_batcher", Spy())
    assert wire.call("Route", ROUTE, timeout=7.0).code is grpc.StatusCode.OK
    assert wire.call("Route", ROUTE, timeout=None).code is grpc.StatusCode.OK
    assert 0.0 < seen[0] <= 7.1
    assert seen[1] is None


def test_a_deadline_that_passes_in_the_queue(held_server: Any) -> None:
    _, wire, batcher = held_server()
    batcher.failure = TimeoutError(CANARY)
    answer = wire.call("Route", ROUTE)
    assert answer.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert CANARY not in answer.text + answer.metadata


def test_a_cancelled_call_leaves_nothing_behind(held_server: Any) -> None:
    server, wire, batcher = held_server(workers=1)
    batcher.gate.clear()
    calls = [wire.start("Route", ROUTE) for _ in range(20)]
    assert batcher.entered.acquire(timeout=10.0)
    for call in calls:
        call.cancel()
    # until the server has heard of it
    time.sleep(0.5)
    batcher.gate.set()
    while server.pending:
        time.sleep(0.001)
    # the server's own check and the one that was at work; one more may have slipped through
    assert batcher.calls <= 3
    assert wire.works()


def test_requests_that_never_arrive_hold_up_nobody(held_server: Any, plane: str) -> None:
    server, wire, _ = held_server(workers=2)
    # the first bytes of a message that says it is 1 MiB long
    opening = http2.opening(b"/proteus.v1.RouterService/Route")
    opening += http2.frame(http2.DATA, stream=1, payload=b"\0\0\x10\0\0abc")
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            peer = stack.enter_context(socket.socket(socket.AF_UNIX))
            peer.connect(wire.address.removeprefix("unix:"))
            peer.sendall(opening)
        for _ in range(20):
            assert wire.works()
        # grpcio counts a call from its headers on, the native plane from its whole request on
        assert plane == "grpcio" or server.pending == 0
    deadline = time.monotonic() + 10.0
    while server.pending and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.pending == 0


class OddError(Exception):
    def __str__(self) -> str:
        raise RuntimeError(CANARY)


@pytest.mark.parametrize(
    "failure",
    [
        ValueError(CANARY),
        TypeError(CANARY),
        RuntimeError(CANARY),
        KeyError(CANARY),
        MemoryError(CANARY),
        UnicodeDecodeError("utf-8", CANARY.encode(), 0, 1, CANARY),
        AssertionError(CANARY),
        OSError(2, CANARY, CANARY),
        RecursionError(CANARY),
        OddError(),
    ],
    ids=lambda failure: type(failure).__name__,
)
@pytest.mark.parametrize("method", ["Route", "RouteBatch"])
def test_an_exception_s_text_reaches_nobody(
    held_server: Any,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    failure: Exception,
    method: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    _, wire, batcher = held_server()
    failure.__cause__ = ValueError(CANARY)
    batcher.failure = failure
    request = ROUTE if method == "Route" else pb.RouteBatchRequest(texts=[CANARY], tau=[0.5])
    answer = wire.call(method, request)
    assert answer.code is grpc.StatusCode.INTERNAL
    info = answer.detail(error_details_pb2.ErrorInfo)
    reference = info.metadata["reference"]
    assert (info.reason, info.domain) == ("INTERNAL", "proteus.v1")
    assert answer.text == f"internal error, reference {reference}"
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    line = record.getMessage()
    assert reference in line
    assert f"type={type(failure).__qualname__}" in line
    assert f"method={method}" in line
    assert "service.py" in line
    assert "\n" not in line
    seen = answer.text + answer.metadata + caplog.text + "".join(capfd.readouterr())
    assert CANARY not in seen
    batcher.failure = None
    assert wire.works()


def test_a_log_that_fails_ends_no_thread(
    router: Any, plane: str, socket_dir: Any, wire_to: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError(CANARY)

    options = app.Options(data_plane=plane, workers=2, access_log_sample=1.0)
    server = app.Server(router, f"unix:{socket_dir}/s", options)
    with wire_to(server) as wire:
        with monkeypatch.context() as patch:
            patch.setattr(server._service._access_log, "call", fail)
            for _ in range(5):
                answer = wire.call("GetInfo", timeout=5.0)
                assert answer.code is grpc.StatusCode.INTERNAL
                assert answer.text.startswith("internal error, reference ")
                assert CANARY not in answer.text + answer.metadata
        assert wire.call("GetInfo").code is grpc.StatusCode.OK


def test_no_prompt_is_in_the_log_of_any_call(
    held_server: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    _, wire, _ = held_server()
    seen = []
    requests: list[tuple[str, Any]] = [
        ("Route", pb.RouteRequest(text=CANARY, tau=0.5)),
        ("Route", pb.RouteRequest(text=CANARY)),
        ("Route", pb.RouteRequest(text=CANARY, tau=9.0)),
        ("Route", pb.RouteRequest(text=CANARY, tau=1.0, strict=True)),
        ("Route", pb.RouteRequest(text="q", tau=0.5, available=[CANARY])),
        ("Route", pb.RouteRequest(embedding=CANARY.encode(), tau=0.5)),
        ("Route", pb.RouteRequest(text=CANARY, tau=0.5).SerializeToString()[:-3]),
        ("Route", CANARY.encode()),
        ("RouteBatch", pb.RouteBatchRequest(texts=[CANARY] * 3, tau=[0.5] * 2)),
        ("RouteBatch", pb.RouteBatchRequest(texts=[CANARY], embeddings=CANARY.encode(), tau=[0.5])),
        ("RouteBatch", pb.RouteBatchRequest(embeddings=CANARY.encode(), rows=3, tau=[0.5])),
        ("GetInfo", CANARY.encode()),
        ("Explain", CANARY.encode()),
        ("Route", pb.RouteRequest(text=CANARY * 300_000, tau=0.5)),
    ]
    for method, request in requests:
        answer = wire.call(method, request)
        seen.append(answer.text + answer.metadata)
    assert CANARY not in "".join(seen) + caplog.text + "".join(capfd.readouterr())


def test_a_router_that_cannot_decide_is_not_served(
    router: Any, monkeypatch: pytest.MonkeyPatch, socket_dir: Any
) -> None:
    class Broken:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def route(self, *_: Any, **__: Any) -> Any:
            return type("Result", (), {"choice": np.array([-1]), "status": np.array([4])})

        def close(self, drain: bool = True) -> None:
            pass

    monkeypatch.setattr(control, "Batcher", Broken)
    server = app.Server(router, f"unix:{socket_dir}/broken")
    with pytest.raises(RuntimeError, match="router: expected a decision, got choice -1 with status 4"):
        server.start()
    assert not list(socket_dir.iterdir())


def test_health_follows_the_router(held_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_HEALTH_PERIOD_S", 0.02)
    _, wire, batcher = held_server()

    def wait_for(status: int) -> None:
        deadline = time.monotonic() + 10.0
        while wire.health() != status:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    batcher.failure = RuntimeError(CANARY)
    wait_for(health_pb2.HealthCheckResponse.NOT_SERVING)
    batcher.failure = QueueFullError("full")
    wait_for(health_pb2.HealthCheckResponse.SERVING)
    batcher.failure = None
    assert wire.works()


def test_the_error_table() -> None:
    def code(error: Exception, *, draining: bool = False) -> int:
        return errors.refusal_of(error, "Route", draining=draining).code

    assert code(QueueFullError("x")) == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert code(TimeoutError("x")) == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    assert code(RuntimeError("batcher: closed"), draining=True) == grpc.StatusCode.UNAVAILABLE.value[0]
    assert code(RuntimeError("batcher: closed")) == grpc.StatusCode.INTERNAL.value[0]
    assert code(ValueError("x")) == grpc.StatusCode.INTERNAL.value[0]
    refusal = errors.invalid([("tau", "expected a number in [0, 1], got 2")])
    assert errors.refusal_of(refusal, "Route", draining=True) is refusal
