"""From start to exit: one line when ready, drains that lose nothing, exit statuses, sockets that stay or go."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from proteus_server import app
from proteus_server import proteus_pb2 as pb
from proteus_server.client import Client
from tests.server import http2

CANARY = "canary-91c2-the-prompt-of-a-user"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_started_and_stopped(launch: Any, socket_dir: Path, kind: str, number: int) -> None:
    path = socket_dir / "s"
    process = launch("--address", f"unix:{path}" if kind == "unix" else "localhost:0")
    address = process.address()
    with Client(address, timeout_s=10.0) as client:
        assert client.healthy()
        assert client.route(CANARY, tau=0.5).candidate
    assert process.stop(number) == 0
    assert not path.exists()
    lines = process.text.splitlines()
    assert [line for line in lines if line.startswith("listening on ")] == [f"listening on {address}"]
    logged = [line.split("proteus_server: ")[1].split(":")[0] for line in lines if "proteus_server: " in line]
    assert logged == ["start", "ready", "drain", "stop"]
    assert CANARY not in process.text


def test_a_signal_that_another_thread_gets_stops_the_server(socket_dir: Path) -> None:
    code = f"""
import os, signal, sys, threading, time
from proteus_server import app
from proteus_server.client import Client

class Out:
    write = staticmethod(sys.stderr.write)
    def flush(self):
        ready.set()

ready = threading.Event()
sys.stdout = Out()

def kill():
    ready.wait()
    # a signal that has nothing to do with the server
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.5)
    with Client("unix:{socket_dir}/s", timeout_s=10.0) as client:
        sys.stderr.write("still healthy\\n" * client.healthy())
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

signal.signal(signal.SIGUSR1, lambda *_: None)
threading.Thread(target=kill).start()
sys.exit(app.serve(None, "unix:{socket_dir}/s"))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=socket_dir, timeout=60.0, capture_output=True, text=True)
    assert (done.returncode, "stop" in done.stderr, "still healthy" in done.stderr) == (0, True, True), done.stderr


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("cuda", "expected one of the 0 CUDA devices that torch sees, got 'cuda'"),
        ("abacus", "expected 'cpu', 'cuda' or"),
    ],
)
def test_a_device_that_is_not_there(launch: Any, socket_dir: Path, device: str, said: str) -> None:
    process = launch("--address", f"unix:{socket_dir}/s", "--device", device)
    assert process.wait() == 1
    assert f"proteus serve: device: {said}" in process.text


@pytest.mark.parametrize("out", ["closed", "a reader that has left", "full"])
def test_an_output_that_nobody_reads_is_no_reason_not_to_serve(socket_dir: Path, out: str) -> None:
    command = [sys.executable, "-m", "proteus_server", "--address", f"unix:{socket_dir}/s"]
    if out == "closed":
        command = ["/bin/sh", "-c", 'exec "$0" "$@" >&-', *command]
    read, written = os.pipe()
    os.close(read)
    with (
        Path("/dev/full").open("w") as full,
        subprocess.Popen(
            command, cwd=socket_dir, stdout=full if out == "full" else written, stderr=subprocess.PIPE
        ) as process,
        Client(f"unix:{socket_dir}/s", timeout_s=10.0) as client,
    ):
        end = time.monotonic() + 30.0
        while not client.healthy():
            assert time.monotonic() < end
            time.sleep(0.01)
        process.terminate()
        error = process.communicate(timeout=30.0)[1]
    os.close(written)
    assert (process.returncode, b"stop: cut_off=0" in error, b"Traceback" in error) == (0, True, False), error
    assert not (socket_dir / "s").exists()


def test_descriptors_are_as_many_as_allowed(launch: Any, socket_dir: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (500, hard))
    try:
        process = launch("--address", f"unix:{socket_dir}/s")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    process.address()
    most = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    assert resource.prlimit(process.popen.pid, resource.RLIMIT_NOFILE) == (most, hard)


def test_a_drain_loses_no_call(launch: Any, plane: str, socket_dir: Path) -> None:
    process = launch("--address", f"unix:{socket_dir}/s", "--data-plane", plane)
    address = process.address()
    calls: list[tuple[float, BaseException | None]] = []
    stop = threading.Event()

    def load() -> None:
        with Client(address, timeout_s=20.0) as client:
            while not stop.is_set():
                start = time.monotonic()
                try:
                    client.route("Which gas do plants take in?", tau=0.5)
                except BaseException as error:
                    calls.append((start, error))
                    return
                calls.append((start, None))

    threads = [threading.Thread(target=load) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    signalled = time.monotonic()
    assert process.stop() == 0
    stop.set()
    for thread in threads:
        thread.join()
    lost = [error for start, error in calls if start < signalled and error is not None]
    assert lost == []
    refused = [error for _, error in calls if error is not None]
    assert all(isinstance(error, ConnectionError) for error in refused), refused
    assert len(calls) > 50


def test_a_long_call_is_finished_before_the_exit(launch: Any, plane: str, socket_dir: Path) -> None:
    process = launch("--address", f"unix:{socket_dir}/s", "--data-plane", plane, "--drain-seconds", "60")
    address = process.address()
    answers: list[Any] = []
    text = "a question with some words to encode " * 30

    def ask() -> None:
        with Client(address, timeout_s=60.0) as client:
            answers.append(client.route_batch([text] * 7000, tau=0.5))

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.1)
    assert process.stop() == 0
    thread.join()
    assert len(answers[0].choice) == 7000


def test_a_call_that_is_arriving_is_finished_before_the_exit(launch: Any, plane: str, socket_dir: Path) -> None:
    """Half of a request is sent before the signal, the rest well after it."""
    process = launch("--address", f"unix:{socket_dir}/s", "--data-plane", plane)
    process.address()
    message = pb.RouteRequest(text=CANARY, tau=0.5).SerializeToString()
    data = b"\0" + len(message).to_bytes(4, "big") + message
    with socket.socket(socket.AF_UNIX) as peer, peer.makefile("rb") as frames:
        peer.connect(f"{socket_dir}/s")
        peer.settimeout(20.0)
        peer.sendall(http2.opening(b"/proteus.v1.RouterService/Route"))
        peer.sendall(http2.frame(http2.DATA, stream=1, payload=data[:9]))
        time.sleep(0.3)
        process.popen.send_signal(signal.SIGTERM)
        time.sleep(1.5)
        peer.sendall(http2.frame(http2.DATA, http2.END_STREAM, 1, data[9:]))
        body, frame = b"", http2.read_frame(frames)
        while not (frame.stream == 1 and frame.flags & http2.END_STREAM):
            body += frame.payload if frame.kind == http2.DATA else b""
            frame = http2.read_frame(frames)
    assert pb.RouteReply.FromString(body[5:]).status == pb.FEASIBLE
    assert process.wait() == 0
    assert "cut_off=0" in process.text


def test_while_draining(held_server: Any) -> None:
    server, wire, batcher = held_server(workers=2)
    watch = health_pb2_grpc.HealthStub(wire.channel).Watch(health_pb2.HealthCheckRequest(service=""), timeout=30.0)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    batcher.gate.clear()
    request = pb.RouteRequest(text="q", tau=0.5)
    # two run, three wait
    taken = [wire.start("Route", request) for _ in range(5)]
    while server.pending < 5:
        time.sleep(0.001)
    cut_off: list[int] = []
    drain = threading.Thread(target=lambda: cut_off.append(server.drain(20.0)))
    drain.start()
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    while not server._service.draining:
        time.sleep(0.001)
    # the data plane hears of it next
    time.sleep(0.05)
    for service in ("", "proteus.v1.RouterService"):
        assert wire.health(service) == health_pb2.HealthCheckResponse.NOT_SERVING
    for method, body in [("Route", request), ("GetInfo", b""), ("RouteBatch", b"")]:
        answer = wire.call(method, body)
        assert (answer.code, answer.text) == (grpc.StatusCode.UNAVAILABLE, "server: draining, no new calls")
        assert answer.detail(error_details_pb2.RetryInfo) is not None
    assert not any(call.done() for call in taken)
    batcher.gate.set()
    assert all(pb.RouteReply.FromString(call.result(timeout=10.0)).candidate for call in taken)
    drain.join(10.0)
    assert cut_off == [0]
    assert wire.call("Route", request).code is grpc.StatusCode.UNAVAILABLE


def test_an_old_connection_is_told_to_go(router: Any, plane: str, socket_dir: Path) -> None:
    options = app.Options(data_plane=plane, max_connection_age=0.5)
    with app.Server(router, f"unix:{socket_dir}/s", options).running() as address:
        with socket.socket(socket.AF_UNIX) as peer, peer.makefile("rb") as frames:
            peer.settimeout(20.0)
            peer.connect(f"{socket_dir}/s")
            peer.sendall(http2.PREFACE + http2.frame(http2.SETTINGS))
            while http2.read_frame(frames).kind != http2.GOAWAY:
                pass
        # a client that stays goes on by other connections
        with Client(address, timeout_s=20.0) as client:
            end = time.monotonic() + 2.0
            while time.monotonic() < end:
                assert client.route("Which gas do plants take in?", tau=0.5).candidate


def test_what_outlasts_the_drain_is_cut_off(held_server: Any) -> None:
    server, wire, batcher = held_server(workers=1)
    batcher.gate.clear()
    calls = [wire.start("Route", pb.RouteRequest(text="q", tau=0.5)) for _ in range(3)]
    while server.pending < 3:
        time.sleep(0.001)
    start = time.monotonic()
    assert server.drain(0.3) == 3
    assert time.monotonic() - start < 5.0
    assert {call.code() for call in calls} <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
    batcher.gate.set()


def test_a_second_signal_ends_the_drain(launch: Any, socket_dir: Path) -> None:
    process = launch("--address", f"unix:{socket_dir}/s", "--drain-seconds", "600")
    address = process.address()
    text = "a question with some words to encode " * 400
    failures: list[BaseException] = []

    def ask() -> None:
        with Client(address, timeout_s=60.0) as client:
            for _ in range(50):
                try:
                    client.route_batch([text] * 550, tau=0.5)
                except BaseException as error:
                    failures.append(error)
                    return

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    process.popen.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.stop() == 0
    for thread in threads:
        thread.join()
    assert all(isinstance(failure, ConnectionError | RuntimeError) for failure in failures)


def test_killed_and_started_again(launch: Any, socket_dir: Path) -> None:
    path = socket_dir / "s"
    killed = launch("--address", f"unix:{path}")
    killed.address()
    killed.popen.kill()
    killed.wait()
    assert path.is_socket()
    second = launch("--address", f"unix:{path}")
    with Client(second.address(), timeout_s=10.0) as client:
        assert client.route("q", tau=0.5).candidate
    third = launch("--address", f"unix:{path}")
    assert third.wait() == 1
    assert "address: expected a free socket" in third.text
    assert path.is_socket()
    assert second.stop() == 0


@pytest.mark.parametrize(
    ("arguments", "environment", "status", "text"),
    [
        ([], {}, 2, "--address"),
        (["--address", "nonsense"], {}, 2, "address: expected HOST:PORT or unix:PATH, got 'nonsense'"),
        (["--address", "0.0.0.0:0"], {}, 2, "--insecure"),
        (["--address", "no-such-host.invalid:0"], {}, 1, "address: expected a host that resolves"),
        (["--address", "192.0.2.7:0", "--insecure"], {}, 1, "address: cannot bind 192.0.2.7:0: "),
        (["--address", "unix:/no/such/folder/s"], {}, 1, "No such file or directory"),
        (["--address", "localhost:0", "--checkpoint", "/no/such/folder"], {}, 1, "/no/such/folder"),
        (["--address", "localhost:0", "--workers", "0"], {}, 2, "workers: expected 1 to 1048576, got 0"),
        (["--address", "localhost:0", "--max-queue", "-1"], {}, 2, "max_queue: expected 1 to 1048576, got -1"),
        (["--address", "localhost:0", "--max-batch-size", "x"], {}, 2, "--max-batch-size"),
        (["--address", "localhost:0", "--drain-seconds", "nan"], {}, 2, "drain_seconds: expected 0 to 3600, got nan"),
        (["--address", "localhost:0", "--log-level", "loud"], {}, 2, "--log-level"),
        (["--address", "localhost:0"], {"PROTEUS_LOG": "loud"}, 2, "PROTEUS_LOG: expected"),
        (["--no-such-option"], {}, 2, "usage:"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_started(
    launch: Any, arguments: list[str], environment: dict[str, str], status: int, text: str
) -> None:
    process = launch(*arguments, **environment)
    assert process.wait() == status
    assert text in process.text
    assert "Traceback" not in process.text
    assert "listening" not in process.text


def test_insecure_allows_every_interface(launch: Any) -> None:
    process = launch("--address", "0.0.0.0:0", "--insecure", "--log-level", "warning")
    port = process.address().rpartition(":")[2]
    with Client(f"127.0.0.1:{port}", timeout_s=10.0) as client:
        assert client.healthy()
    assert process.stop() == 0
    assert "start:" not in process.text


def test_help_names_every_option(launch: Any) -> None:
    process = launch("--help")
    assert process.wait() == 0
    for option in (
        "address",
        "checkpoint",
        "insecure",
        "max-queue",
        "max-batch-size",
        "workers",
        "drain-seconds",
        "data-plane",
        "threads",
        "log-level",
    ):
        assert f"--{option}" in process.text


def test_no_prompt_is_in_a_debug_log(launch: Any, socket_dir: Path) -> None:
    process = launch("--address", f"unix:{socket_dir}/s", "--log-level", "debug")
    with Client(process.address(), timeout_s=20.0) as client:
        client.route(CANARY, tau=0.5)
        client.route_batch([CANARY] * 3, tau=0.5)
        for call in (
            lambda: client.route(CANARY, tau=3.0),
            lambda: client.route("q", tau=0.5, available=[CANARY]),
            lambda: client.route(CANARY * 300_000, tau=0.5),
        ):
            with pytest.raises(ValueError, match=r"expected|larger"):
                call()
    assert process.stop() == 0
    assert CANARY not in process.text
