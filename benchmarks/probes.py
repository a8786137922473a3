"""What the scenarios do beside a load, and how they read what came of it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks import load, serving
from proteus_fast import Router
from proteus_server import proteus_pb2 as pb

CANARY = "canary-5b1e-the-words-of-a-user"
# float32 by another order of additions
_SCORE_BAND = 1e-5
_TIE_BAND = 2e-5
_SWAP_PAUSE_S = 0.02


@contextlib.contextmanager
def abusers(address: str, seconds: float) -> Iterator[list[str]]:
    """Run benchmarks.abuse beside a `with` block and wait for its end; the list then holds what it says."""
    command = [sys.executable, "-m", "benchmarks.abuse", address, "--seconds", str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=load.ROOT) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise load.NotMeasured("benchmarks.abuse did not start")
        said: list[str] = []
        yield said
        said.append(process.communicate()[0].strip())
        if process.returncode:
            raise load.NotMeasured(f"benchmarks.abuse: exit status {process.returncode}")


def beside(
    measure: Callable[[], dict[str, Any]], actions: Sequence[Callable[[], object]]
) -> tuple[int, dict[str, Any]]:
    """Do these one after the other while a measurement runs; how many were done until its end, and what it gave."""
    done = 0
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(measure)
        # until the first calls are answered
        time.sleep(0.8)
        for action in actions:
            if result.done():
                break
            action()
            done += 1
            time.sleep(_SWAP_PAUSE_S)
        return done, result.result()


def mixed_answers(answers: Sequence[Sequence[Any]], paths: Sequence[Path]) -> tuple[int, int]:
    """Replies whose choice and score are not those of the router that their versions name; and versions seen.

    Args:
        answers: of the load's client: message, choice, bits of the score, Versions in hexadecimal, how often.
        paths: the checkpoints that were served.
    """
    expected = {}
    for path in paths:
        router = Router.load(path)
        key = tuple(router.versions[name] for name in ("router", "prices", "certificate"))
        requests = [pb.RouteRequest.FromString(one) for one in load.requests("embedding", router.input_dim)]
        x = np.stack([np.frombuffer(request.embedding, "<f4") for request in requests])
        expected[key] = router.route_batch(x, load.TAU)
    mixed, seen = 0, set()
    for message, choice, bits, data, count in answers:
        named = pb.Versions.FromString(bytes.fromhex(data))
        versions = (named.router, named.prices, named.certificate)
        seen.add(versions)
        score = float(np.array(bits, np.uint32).view(np.float32))
        if versions not in expected:
            mixed += count
            continue
        batch = expected[versions]
        # another choice is right where it scores as much
        band = _SCORE_BAND if int(batch.choice[message]) == choice else _TIE_BAND
        mixed += count if abs(float(batch.score[message]) - score) > band else 0
    return mixed, len(seen)


def soak(
    server: serving.Running, measure: Callable[..., dict[str, Any]], seconds: float
) -> tuple[list[tuple[float, dict[str, int]]], dict[str, int]]:
    """Load in pieces of ten seconds, each on new connections; the server's state after each, by seconds."""
    begin = time.monotonic()
    samples, totals, turn = [], {"calls": 0, "errors": 0}, 0
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("embedding", {"rate": 4000}), ("text", {"rate": 2000}), ("embedding", {"rate": 50, "rows": 256}),
    ]  # fmt: skip
    while (spent := time.monotonic() - begin) < seconds:
        kind, options = kinds[turn % len(kinds)]
        turn += 1
        result = measure(server.address, kind, seconds=min(10.0, seconds / 12), **options)
        for name in totals:
            totals[name] += result[name]
        samples.append((spent, server.status()))
    return samples, totals


def slope_per_hour(points: Sequence[tuple[float, float]]) -> float:
    """Least squares over (seconds, value)."""
    seconds, values = np.array(points).T
    return float(np.polyfit(seconds / 3600.0, values, 1)[0])


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def canaries(server: serving.Running, metrics: str) -> tuple[int, int, dict[str, int]]:
    """Requests with the canary in them: how many, how many of those were refused, and hits by place.

    Args:
        metrics: the URL of the server's metrics.
    """
    info = load.info_of(server.address)
    embedding = (CANARY.encode() * info.input_dim)[: 4 * info.input_dim]
    good = [
        ("Route", pb.RouteRequest(text=CANARY, tau=0.5)),
        ("Route", pb.RouteRequest(embedding=embedding, tau=0.5)),
        ("RouteBatch", pb.RouteBatchRequest(texts=[CANARY] * 3, tau=[0.5])),
    ]
    bad: list[tuple[str, Any]] = [
        ("Route", pb.RouteRequest(text=CANARY)),
        ("Route", pb.RouteRequest(text=CANARY, tau=9.0)),
        ("Route", pb.RouteRequest(text=CANARY, tau=1.0, strict=True)),
        ("Route", pb.RouteRequest(text="q", tau=0.5, available=[CANARY])),
        ("Route", pb.RouteRequest(embedding=CANARY.encode(), tau=0.5)),
        ("Route", pb.RouteRequest(text=CANARY, tau=0.5).SerializeToString()[:-3]),
        ("Route", pb.RouteRequest(text=CANARY * 300_000, tau=0.5)),
        ("Route", CANARY.encode()),
        ("RouteBatch", pb.RouteBatchRequest(texts=[CANARY] * 3, tau=[0.5] * 2)),
        ("RouteBatch", pb.RouteBatchRequest(texts=[CANARY], embeddings=embedding, tau=[0.5])),
        ("RouteBatch", pb.RouteBatchRequest(embeddings=CANARY.encode(), rows=3, tau=[0.5])),
        ("GetInfo", CANARY.encode()),
        ("Explain", CANARY.encode()),
        (CANARY, CANARY.encode()),
    ]
    errors, replies, refused, calls = "", b"", 0, 0
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(server.address, options=options) as channel:
        for _ in range(20):
            for method, request in good + bad:
                data = request if isinstance(request, bytes) else request.SerializeToString()
                calls += 1
                try:
                    # the metadata of a caller is as private
                    metadata = [("x-note", CANARY)]
                    replies += channel.unary_unary(f"/proteus.v1.RouterService/{method}")(
                        data, timeout=20.0, metadata=metadata
                    )
                except grpc.RpcError as error:
                    refused += 1
                    errors += f"{error.details()} {error.trailing_metadata()!r} {error.initial_metadata()!r}\n"
    log = server.log.read_bytes()
    with urllib.request.urlopen(metrics, timeout=20.0) as answer:
        counted = answer.read()
    if b"proteus_calls_total" not in counted:
        raise load.NotMeasured(f"{metrics}: no proteus_calls_total")
    return calls, refused, {
        "texts and metadata of errors": errors.count(CANARY),
        "replies": replies.count(CANARY.encode()),
        "the log at level debug with every call, standard error": log.count(CANARY.encode()),
        "metrics": counted.count(CANARY.encode()),
    }  # fmt: skip
