"""The native data plane: byte for byte what the grpcio plane answers, and what only it does."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proteus_fast import Router
from proteus_server import app, control, native, service
from proteus_server import proteus_pb2 as pb
from tests.server import http2

if not native.is_built():
    pytest.skip("this build has no native data plane", allow_module_level=True)

DIM = 16
NAMES = [f"model-{i}" for i in range(4)]


class Both:
    """One router behind both data planes, asked the same."""

    def __init__(self, planes: dict[str, Any]) -> None:
        self._planes = planes

    def ask(self, method: str, data: bytes) -> None:
        """Call both, and hold the answers to each other."""
        answers = [wire.call(method, data) for wire in self._planes.values()]
        codes, texts = {answer.code for answer in answers}, {answer.text for answer in answers}
        assert len(codes) == len(texts) == 1, answers
        kind = pb.RouteReply if method == "Route" else pb.RouteBatchReply
        if answers[0].code is grpc.StatusCode.OK:
            replies = [kind.FromString(answer.reply) for answer in answers]
            for answer, reply in zip(answers, replies, strict=True):
                # what was written is what Python's protobuf would have written
                assert reply.SerializeToString() == answer.reply
                reply.timings.Clear()
                reply.timings.SetInParent()
            assert replies[0].SerializeToString() == replies[1].SerializeToString()
        else:
            assert answers[0].status == answers[1].status


@pytest.fixture(scope="module")
def both(tiny: Callable[..., Router], wire_to: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    router = tiny()
    folder = tmp_path_factory.mktemp("s")
    with contextlib.ExitStack() as stack:
        yield Both(
            {
                plane: stack.enter_context(
                    wire_to(app.Server(router, f"unix:{folder}/{plane}", app.Options(data_plane=plane)))
                )
                for plane in app.DATA_PLANES
            }
        )


def floats(rows: int) -> st.SearchStrategy[bytes]:
    value = st.floats(-4.0, 4.0, width=32) | st.sampled_from([np.nan, np.inf, 0.0])
    return st.lists(value, min_size=rows * DIM, max_size=rows * DIM).map(lambda x: np.array(x, "<f4").tobytes())


TAUS = st.floats(0.0, 1.0) | st.floats()
COMMON = {
    "available": st.lists(st.sampled_from([*NAMES, "no-such", ""]), max_size=4),
    "strict": st.booleans(),
    "mode": st.integers(-1, 3) | st.integers(-(2**31), 2**31 - 1),
    "guarantee": st.integers(0, 3),
}
ROUTES = st.fixed_dictionaries(
    {}, optional={"text": st.text(max_size=60), "embedding": floats(1) | st.binary(max_size=70), "tau": TAUS, **COMMON}
).map(lambda fields: pb.RouteRequest(**fields).SerializeToString())
BATCHES = (
    st.integers(1, 5)
    .flatmap(
        lambda rows: st.fixed_dictionaries(
            {},
            optional={
                "texts": st.lists(st.text(max_size=20), max_size=5),
                "embeddings": floats(rows) | st.binary(max_size=70),
                "rows": st.just(rows) | st.integers(0, 2**32 - 1),
                "tau": st.lists(TAUS, max_size=5) | st.lists(TAUS, min_size=1, max_size=1),
                **COMMON,
            },
        )
    )
    .map(lambda fields: pb.RouteBatchRequest(**fields).SerializeToString())
)


@st.composite
def spoiled(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """A message with other fields among its own, twice itself, cut off, or with a byte changed."""
    data = draw(whole)
    match draw(st.integers(0, 5)):
        case 0:
            # a field of any number and wire type
            tag = draw(st.integers(0, 2**7 - 1) | st.integers(0, 2**33))
            return _varint(tag) + draw(st.binary(max_size=12)) + data
        case 1:
            return data + draw(whole)
        case 2:
            return data[: draw(st.integers(0, len(data)))]
        case 3 if data:
            at = draw(st.integers(0, len(data) - 1))
            return data[:at] + draw(st.binary(max_size=3)) + data[at + 1 :]
        case 4:
            return draw(st.binary(max_size=40))
    return data


def _varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


TOGETHER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@TOGETHER
@given(data=ROUTES | spoiled(ROUTES))
def test_a_route_is_answered_as_by_grpcio(both: Both, data: bytes) -> None:
    both.ask("Route", data)


@pytest.mark.parametrize("names", [4096, 4097])
def test_many_names_are_answered_as_by_grpcio(both: Both, names: int) -> None:
    available = ["x"] * names
    both.ask("Route", pb.RouteRequest(text="q", tau=0.5, available=available).SerializeToString())
    both.ask("RouteBatch", pb.RouteBatchRequest(texts=["q"], tau=[0.5], available=available).SerializeToString())


@TOGETHER
@given(data=BATCHES | spoiled(BATCHES))
def test_a_batch_is_answered_as_by_grpcio(both: Both, data: bytes) -> None:
    both.ask("RouteBatch", data)


@pytest.mark.parametrize("method", ["Explain", "ReportOutcome", "Rout", "route"])
def test_what_is_not_implemented_is_refused_as_by_grpcio(both: Both, method: str) -> None:
    both.ask(method, b"")


@pytest.fixture
def native_server(router: Router, socket_dir: Path) -> Iterator[tuple[app.Server, str]]:
    server = app.Server(router, f"unix:{socket_dir}/s", app.Options(data_plane="native", threads=2))
    with server.running() as place:
        yield server, place


def test_a_swap_takes_effect_and_versions_explain_scores(
    tiny: Callable[..., Router], wire_to: Any, socket_dir: Path
) -> None:
    routers = [tiny(right=900), tiny(right=500)]
    expected = {r.versions["certificate"]: r.route("q", 0.4) for r in routers}
    assert len(expected) == 2
    server = app.Server(routers[0], f"unix:{socket_dir}/s", app.Options(data_plane="native"))
    plane = server._plane
    assert isinstance(plane, native.NativePlane)
    generations = [control.Control(router, batching={}).generation for router in routers]
    seen: dict[str, int] = {}
    with wire_to(server) as wire:
        for i in range(400):
            plane.prepare(generations[i % 2])()
            reply = pb.RouteReply.FromString(wire.call("Route", pb.RouteRequest(text="q", tau=0.4)).reply)
            decision = expected[reply.versions.certificate]
            assert (reply.score, reply.status) == (decision.score, decision.status)
            seen[reply.versions.certificate] = seen.get(reply.versions.certificate, 0) + 1
    assert seen == dict.fromkeys(expected, 200)


def test_several_threads_serve_one_socket(native_server: Any, wire_to_address: Any) -> None:
    _, place = native_server
    failures: list[Any] = []

    def ask() -> None:
        with wire_to_address(place) as wire:
            failures.extend(not wire.works() for _ in range(50))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [False] * 200


def test_a_watch_of_an_unknown_service(native_server: Any, wire_to_address: Any) -> None:
    _, place = native_server
    with wire_to_address(place) as wire:
        stub = health_pb2_grpc.HealthStub(wire.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="no.such"), timeout=10.0)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()
        assert wire.works()


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def literal(name: bytes, value: bytes) -> bytes:
    return bytes([0, len(name)]) + name + bytes([len(value)]) + value


HEADERS = b"\x83\x86" + literal(b":path", b"/proteus.v1.RouterService/Route") + literal(b":authority", b"localhost")
HEADERS += literal(b"content-type", b"application/grpc") + literal(b"te", b"trailers")


def test_rapid_resets_end_their_own_connection_only(native_server: Any, wire_to_address: Any) -> None:
    server, place = native_server
    with wire_to_address(place) as wire, socket.socket(socket.AF_UNIX) as peer:
        peer.connect(place.removeprefix("unix:"))
        peer.settimeout(10.0)
        peer.sendall(http2.PREFACE + frame(4, 0, 0))
        cancel = (8).to_bytes(4, "big")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for first in range(1, 20_001, 200):
                peer.sendall(
                    b"".join(
                        frame(1, 4, stream, HEADERS) + frame(3, 0, stream, cancel)
                        for stream in range(first, first + 200, 2)
                    )
                )
        said = b""
        with contextlib.suppress(ConnectionResetError):
            while data := peer.recv(65536):
                said += data
        # a GOAWAY frame, then the end
        assert frame(7, 0, 0)[3:5] in said
        assert wire.works()
    assert server.pending == 0


def test_slow_and_idle_peers_hold_up_nobody(native_server: Any, wire_to_address: Any) -> None:
    server, place = native_server
    plane = server._plane
    with contextlib.ExitStack() as stack:
        wire = stack.enter_context(wire_to_address(place))
        peers = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(300)]
        for index, peer in enumerate(peers):
            peer.connect(place.removeprefix("unix:"))
            # nothing, a part of the preface, a part of a request
            peer.sendall([b"", http2.PREFACE[:7], http2.PREFACE + frame(4, 0, 0) + frame(1, 4, 1, HEADERS)][index % 3])
        deadline = time.monotonic() + 10.0
        while plane._listener.stats()["connections"] < 300 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert plane._listener.stats()["connections"] == 300
        for peer in peers[2::3]:
            peer.sendall(frame(0, 0, 1, b"\0"))
            assert wire.works()
    deadline = time.monotonic() + 10.0
    while plane._listener.stats()["connections"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert plane._listener.stats()["connections"] == 0


def test_a_peer_that_does_not_read_is_not_answered_without_bound(native_server: Any, wire_to_address: Any) -> None:
    _, place = native_server
    body = pb.RouteRequest(text="q", tau=0.5).SerializeToString()
    call = b"\0" + len(body).to_bytes(4, "big") + body
    with wire_to_address(place) as wire, socket.socket(socket.AF_UNIX) as peer:
        peer.connect(place.removeprefix("unix:"))
        peer.sendall(http2.PREFACE + frame(4, 0, 0))
        peer.setblocking(False)
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            for stream in range(1, 40_001, 2):
                peer.sendall(frame(1, 4, stream, HEADERS) + frame(0, 1, stream, call))
        assert wire.works()


@pytest.mark.skipif(not shutil.which("nghttp"), reason="needs nghttp, Debian's nghttp2-client")
@pytest.mark.parametrize(
    ("path", "content_type", "expected"),
    [
        ("proteus.v1.RouterService/Route", "application/grpc", [":status: 200", "grpc-status: 0"]),
        ("proteus.v1.RouterService/Explain", "application/grpc", [":status: 200", "grpc-status: 12"]),
        ("no/such", "application/grpc+proto", [":status: 200", "grpc-status: 12"]),
        ("proteus.v1.RouterService/Route", "application/json", [":status: 415"]),
    ],
)
def test_a_client_that_is_not_grpcio(
    router: Router, tmp_path: Path, path: str, content_type: str, expected: list[str]
) -> None:
    body = pb.RouteRequest(text="q", tau=0.5).SerializeToString()
    (tmp_path / "body").write_bytes(b"\0" + len(body).to_bytes(4, "big") + body)
    with app.Server(router, "127.0.0.1:0", app.Options(data_plane="native")).running() as place:
        command = ["nghttp", "-nv", "-d", str(tmp_path / "body"), "-H", f"content-type: {content_type}"]
        seen = subprocess.run([*command, f"http://{place}/{path}"], capture_output=True, text=True, timeout=20).stdout
    assert [line for line in expected if line not in seen] == []


def test_arguments_of_the_core_are_checked(router: Router) -> None:
    from proteus_fast import _core

    served = native.served(control.Control(router, batching={}).generation)
    for arguments, text in [
        ({"sockets": 3}, "sockets: expected a sequence of int, got int"),
        ({"served": None}, "served: expected a Served, got None"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"calls": "/a"}, "calls: expected a sequence of str, got str"),
        ({"age_s": -1.0}, "age_s: expected 0 to 3e7 seconds, got -1.0"),
    ]:
        with pytest.raises((TypeError, ValueError), match=text):
            _core.Listener(**{"sockets": [], "served": served, **arguments})  # type: ignore[arg-type]
    with pytest.raises(OSError, match="Bad file descriptor"):
        _core.Listener([10**6], served)
    with pytest.raises(ValueError, match="names: expected 14, got 1"):
        _core.Served(router.snapshot, names=["x"], tau_max=[[None] * 2] * 2, versions=b"")


def test_a_forwarded_call_that_is_forgotten_is_an_internal_error(
    router: Router, monkeypatch: pytest.MonkeyPatch, wire_to: Any, socket_dir: Path
) -> None:
    monkeypatch.setattr(native.NativePlane, "_answer", lambda _self, _call: None)
    with wire_to(app.Server(router, f"unix:{socket_dir}/s", app.Options(data_plane="native"))) as wire:
        answer = wire.call("GetInfo")
        assert (answer.code, answer.text) == (grpc.StatusCode.INTERNAL, "internal error")


def test_without_the_listener_grpcio_serves(
    router: Router, monkeypatch: pytest.MonkeyPatch, wire_to: Any, socket_dir: Path
) -> None:
    monkeypatch.setattr(native, "is_built", lambda: False)
    with wire_to(app.Server(router, f"unix:{socket_dir}/s")) as wire:
        assert pb.GetInfoReply.FromString(wire.call("GetInfo").reply).data_plane == "grpcio"
    with pytest.raises(ValueError, match="data_plane: expected grpcio"):
        app.Options(data_plane="native")
    assert service.METHODS
