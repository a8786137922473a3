"""Calls whose request does not come: on grpcio's servers each has a thread, which others need."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from proteus_fast import Router
from proteus_server import admin, app, arrivals, service
from proteus_server import proteus_pb2 as pb
from tests.server import http2
from tests.server.conftest import Wire

PATH = f"/{service.SERVICE_NAME}/Route"


class Peer:
    """A connection on which calls are opened, and nothing is read."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(address.removeprefix("unix:"))
        self.socket.sendall(http2.PREFACE + http2.frame(http2.SETTINGS))
        self._stream = -1

    def open(self, path: str, calls: int = 1) -> int:
        """Send the headers of calls; the last one's stream."""
        block = http2.call_headers(path.encode())
        for _ in range(calls):
            self._stream += 2
            self.socket.sendall(http2.frame(http2.HEADERS, http2.END_HEADERS, self._stream, block))
        return self._stream


@pytest.fixture
def server(router: Router, socket_dir: Path) -> Iterator[app.Server]:
    options = app.Options(data_plane="grpcio", workers=2, max_queue=62, admin_address=f"unix:{socket_dir}/admin")
    server = app.Server(router, f"unix:{socket_dir}/s", options)
    with server.running():
        yield server


@pytest.fixture
def wire(server: app.Server, wire_to_address: Any) -> Iterator[Wire]:
    with wire_to_address(server._address.target) as calls:
        yield calls


@pytest.fixture
def peer(server: app.Server) -> Iterator[Callable[[str], Peer]]:
    with contextlib.ExitStack() as stack:

        def connect(address: str = server._address.target) -> Peer:
            connected = Peer(address)
            stack.enter_context(connected.socket)
            return connected

        yield connect


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 10.0
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_routes_without_a_message_leave_their_places(
    server: app.Server, wire: Wire, peer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrivals, "_PRESSED_S", 30.0)
    peer().open(PATH, 64)
    wait_for(lambda: server.pending == 64)
    request = pb.RouteRequest(text="q", tau=0.5)
    assert wire.call("Route", request).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    # what is refused has no thread either
    peer().open(PATH, 400)
    wait_for(lambda: server._plane.counts()["shed"] == 401)
    wait_for(lambda: wire.call("Check", service=health.SERVICE_NAME).code is grpc.StatusCode.OK)
    monkeypatch.setattr(arrivals, "_PRESSED_S", 0.01)
    wait_for(lambda: wire.call("Route", request).code is grpc.StatusCode.OK)
    # fewer than half of the places have their time
    wait_for(lambda: server.pending < 32)


def test_health_checks_without_a_message_leave_their_threads(
    wire: Wire, peer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrivals, "_PRESSED_S", 30.0)
    peer().open(f"/{health.SERVICE_NAME}/Check", 256)
    wait_for(lambda: sum(thread.name.startswith("proteus-control") for thread in threading.enumerate()) >= 256)
    monkeypatch.setattr(arrivals, "_PRESSED_S", 0.01)
    # within its five seconds
    assert wire.works()


def test_changes_without_a_message_leave_their_threads(
    server: app.Server, peer: Any, wire_to_address: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrivals, "_PRESSED_S", 30.0)
    with wire_to_address(server.admin_address) as operator:
        peer(server.admin_address).open(f"/{admin.SERVICE_NAME}/GetPolicy", 32)

        def code() -> grpc.StatusCode:
            return operator.call("GetPolicy", service=admin.SERVICE_NAME).code  # type: ignore[no-any-return]

        wait_for(lambda: code() is grpc.StatusCode.RESOURCE_EXHAUSTED)
        monkeypatch.setattr(arrivals, "_PRESSED_S", 0.01)
        wait_for(lambda: code() is grpc.StatusCode.OK)


def test_a_few_have_their_time(server: app.Server, peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "_PRESSED_S", 0.01)
    connected = peer()
    stream = connected.open(PATH)
    wait_for(lambda: server.pending == 1)
    body = pb.RouteRequest(text="q", tau=0.5).SerializeToString()
    message = b"\0" + len(body).to_bytes(4, "big") + body
    connected.socket.sendall(http2.frame(http2.DATA, stream=stream, payload=message[:7]))
    time.sleep(3 * arrivals._PERIOD_S)
    assert server.pending == 1
    connected.socket.sendall(http2.frame(http2.DATA, http2.END_STREAM, stream, message[7:]))
    wait_for(lambda: server.pending == 0)
    assert server._plane.calls() == {("Route", "OK"): 1}
    connected.open(PATH)
    wait_for(lambda: server.pending == 1)
    monkeypatch.setattr(arrivals, "_ARRIVE_S", 0.01)
    wait_for(lambda: server.pending == 0)


def test_a_call_that_ends_without_a_message(wire: Wire) -> None:
    for path in (PATH, f"/{health.SERVICE_NAME}/Check"):
        with pytest.raises(grpc.RpcError) as error:
            wire.channel.stream_unary(path)(iter([]), timeout=10.0)
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.value.details() == "request: expected a message, got none"


def test_a_stream_that_waits_for_more(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, done = threading.Event(), threading.Event()

    def requests() -> Iterator[Any]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        asked.set()
        done.wait(10.0)

    replies = reflection_pb2_grpc.ServerReflectionStub(wire.channel).ServerReflectionInfo(requests(), timeout=10.0)
    names = [found.name for found in next(replies).list_services_response.service]
    assert service.SERVICE_NAME in names
    assert asked.wait(10.0)
    monkeypatch.setattr(arrivals, "_ARRIVE_S", 0.01)
    with pytest.raises(grpc.RpcError) as error:
        next(replies)
    assert error.value.code() is grpc.StatusCode.CANCELLED
    done.set()
