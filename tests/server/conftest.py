"""A real server on a real router, raw calls that no client library would make, and a batcher that can be held."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from proteus_fast import Router
from proteus_fast._core import Batcher
from proteus_server import app, control, native
from proteus_server import proteus_pb2 as pb
from tests.checkpoints import tiny_checkpoint

SERVICE = "proteus.v1.RouterService"
READY_S = 60.0
# of a build without libnghttp2 there is one
PLANES = app.DATA_PLANES if native.is_built() else ("grpcio",)


class Answer(NamedTuple):
    """What a call came to: its status, and either the reply's bytes or the error's text and details."""

    code: grpc.StatusCode
    reply: bytes
    text: str
    status: status_pb2.Status | None
    metadata: str

    def detail(self, kind: Any) -> Any:
        """The error detail of this kind; None where there is none."""
        for packed in self.status.details if self.status is not None else ():
            found = kind()
            if packed.Unpack(found):
                return found
        return None

    @property
    def fields(self) -> list[str]:
        """The fields that the error names."""
        bad_request = self.detail(error_details_pb2.BadRequest)
        return [] if bad_request is None else [violation.field for violation in bad_request.field_violations]


class Wire:
    """Calls by name with any bytes, each with a deadline."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_send_message_length", -1),
            ],
        )

    def call(
        self,
        method: str,
        request: Message | bytes = b"",
        *,
        service: str = SERVICE,
        timeout: float = 20.0,
        **options: Any,
    ) -> Answer:
        data = request if isinstance(request, bytes) else request.SerializeToString()
        try:
            return Answer(
                grpc.StatusCode.OK,
                self.channel.unary_unary(f"/{service}/{method}")(data, timeout=timeout, **options),
                "",
                None,
                "",
            )
        except grpc.RpcError as error:
            return Answer(
                error.code(), b"", error.details() or "", rpc_status.from_call(error), repr(error.trailing_metadata())
            )

    def start(self, method: str, request: Message, *, timeout: float = 20.0) -> grpc.Future:
        """A call that is not waited for."""
        return self.channel.unary_unary(f"/{SERVICE}/{method}").future(request.SerializeToString(), timeout=timeout)

    def health(self, service: str = SERVICE) -> int:
        stub = health_pb2_grpc.HealthStub(self.channel)
        return int(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5.0).status)

    def works(self) -> bool:
        """Whether the server decides and says that it is healthy."""
        answer = self.call("Route", pb.RouteRequest(text="Is all well?", tau=0.5))
        return (
            answer.code is grpc.StatusCode.OK
            and pb.RouteReply.FromString(answer.reply).choice >= 0
            and self.health() == health_pb2.HealthCheckResponse.SERVING
        )


class HeldBatcher:
    """The real batcher behind a gate: while the gate is shut, calls wait before they reach it."""

    latest: HeldBatcher

    def __init__(self, snapshot: Any, **options: Any) -> None:
        self._batcher = Batcher(snapshot, **options)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.calls = 0
        self.failure: Exception | None = None
        type(self).latest = self

    def route(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        self.entered.release()
        self.gate.wait(30.0)
        if self.failure is not None:
            raise self.failure
        return self._batcher.route(*arguments, **options)

    def close(self, drain: bool = True) -> None:
        self._batcher.close(drain)


class Process:
    """`python -m proteus_server` with its output read as it comes."""

    def __init__(self, *arguments: str, cwd: Path, **environment: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "proteus_server", *arguments],
            cwd=cwd,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.out: queue.Queue[str] = queue.Queue()
        self.output: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(pipe, pipe is self.popen.stdout))
            for pipe in (self.popen.stdout, self.popen.stderr)
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, pipe: Any, is_out: bool) -> None:
        for line in pipe:
            self.output.append(line)
            if is_out:
                self.out.put(line)
        pipe.close()

    def address(self) -> str:
        line = self.out.get(timeout=READY_S)
        assert line.startswith("listening on ")
        return line.removeprefix("listening on ").strip()

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.popen.send_signal(number)
        return self.wait()

    def wait(self, timeout: float = 60.0) -> int:
        status = self.popen.wait(timeout)
        for reader in self._readers:
            reader.join()
        return status

    @property
    def text(self) -> str:
        return "".join(self.output)


@pytest.fixture(scope="session")
def router() -> Router:
    """The embedded router."""
    return Router.load()


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Router]:
    """Make a router from `tiny_checkpoint`'s arguments."""

    def make(**options: Any) -> Router:
        return Router(tiny_checkpoint(**options))

    return make


@pytest.fixture
def socket_dir() -> Iterator[Path]:
    """A folder whose path leaves room for a socket's name (107 bytes at most)."""
    with tempfile.TemporaryDirectory(prefix="proteus-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module", params=PLANES)
def plane(request: pytest.FixtureRequest) -> str:
    """The data plane that a server is started with; every test that asks for it runs once on each."""
    return str(request.param)


@pytest.fixture(scope="module", params=["unix", "tcp"])
def address(request: pytest.FixtureRequest, router: Router, plane: str) -> Iterator[str]:
    """The address of one server for a whole test file, once on a Unix socket and once on TCP."""
    with tempfile.TemporaryDirectory(prefix="proteus-") as folder:
        place = f"unix:{folder}/server" if request.param == "unix" else "127.0.0.1:0"
        with app.Server(router, place, app.Options(data_plane=plane)).running() as bound:
            yield bound


@pytest.fixture(scope="module")
def wire(address: str) -> Iterator[Wire]:
    calls = Wire(address)
    with contextlib.closing(calls.channel):
        yield calls


@pytest.fixture(scope="session")
def wire_to_address() -> Callable[[str], contextlib.AbstractContextManager[Wire]]:
    """Connect to a server that runs."""

    @contextlib.contextmanager
    def connect(place: str) -> Iterator[Wire]:
        calls = Wire(place)
        with contextlib.closing(calls.channel):
            yield calls

    return connect


@pytest.fixture(scope="session")
def wire_to(wire_to_address: Any) -> Callable[[app.Server], contextlib.AbstractContextManager[Wire]]:
    """Run a server and connect to it."""

    @contextlib.contextmanager
    def run(server: app.Server) -> Iterator[Wire]:
        with server.running() as place, wire_to_address(place) as calls:
            yield calls

    return run


StartServer = Callable[..., tuple[app.Server, Wire, HeldBatcher]]


@pytest.fixture
def held_server(router: Router, plane: str, monkeypatch: pytest.MonkeyPatch, socket_dir: Path) -> Iterator[StartServer]:
    """Start a server, with these options, whose batcher can be held.

    The native plane reaches it by forwarding every call to Python, as it does where the core cannot decide.
    """
    monkeypatch.setattr(control, "Batcher", HeldBatcher)
    monkeypatch.setattr(native, "decided_here", lambda _: (False, False))
    with contextlib.ExitStack() as stack:

        def start(**options: Any) -> tuple[app.Server, Wire, HeldBatcher]:
            server = app.Server(router, f"unix:{socket_dir}/held", app.Options(data_plane=plane, **options))
            batcher = HeldBatcher.latest
            calls = Wire(stack.enter_context(server.running()))
            stack.callback(calls.channel.close)
            stack.callback(batcher.gate.set)
            # the first decision is the server's own
            assert batcher.entered.acquire(timeout=10.0)
            return server, calls, batcher

        yield start


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, **environment: str) -> Process:
            process = Process(*arguments, cwd=tmp_path, **environment)

            def end() -> None:
                if process.popen.poll() is None:
                    process.popen.kill()
                process.wait()

            stack.callback(end)
            return process

        yield start
