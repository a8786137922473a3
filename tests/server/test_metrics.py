"""Metrics: the text format by a strict parser, counts that are those of the calls made, bounded labels, no prompt."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import re
import select
import socket
import socketserver
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from proteus_fast import Router
from proteus_server import app, metrics
from proteus_server.client import Client

CANARY = "canary-3e1b-the-prompt-of-a-user"
DOCS = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
SAMPLE = re.compile(r"([a-z_]+)(?:\{((?:[a-z_]+=\"(?:[^\"\\\n]|\\[\\n\"])*\",?)+)\})? (\S+)")
LABEL = re.compile(r"([a-z_]+)=\"((?:[^\"\\]|\\.)*)\"")


class Family(NamedTuple):
    kind: str
    values: dict[tuple[str, frozenset[tuple[str, str]]], float]

    def __getitem__(self, labels: dict[str, str]) -> float:
        (value,) = [v for (_, found), v in self.values.items() if labels.items() <= dict(found).items()]
        return value


def parse(text: str) -> dict[str, Family]:
    """The text format, with every rule that it has for HELP, TYPE, order, labels and histograms."""
    families: dict[str, Family] = {}
    assert text.endswith("\n")
    name = ""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith("# HELP "):
            name = line.split(" ")[2]
            assert name not in families
            kind = next(lines).split(" ")
            assert kind[:3] == ["#", "TYPE", name]
            assert kind[3] in ("counter", "gauge", "histogram")
            assert name.endswith("_total") == (kind[3] == "counter")
            families[name] = Family(kind[3], {})
            continue
        match = SAMPLE.fullmatch(line)
        assert match is not None, line
        sample, labels, value = match.groups()
        suffix = sample.removeprefix(name)
        assert suffix in (("_bucket", "_sum", "_count") if families[name].kind == "histogram" else ("",)), line
        key = suffix, frozenset(LABEL.findall(labels or ""))
        assert key not in families[name].values
        families[name].values[key] = float(value)
    for family in families.values():
        if family.kind == "histogram":
            buckets = [(float(dict(found)["le"]), v) for (s, found), v in family.values.items() if s == "_bucket"]
            assert buckets == sorted(buckets)
            assert [v for _, v in buckets] == sorted(v for _, v in buckets)
            assert buckets[-1] == (math.inf, family.values["_count", frozenset()])
            assert family.values["_sum", frozenset()] >= 0.0
    return families


class Running(NamedTuple):
    server: app.Server
    client: Client
    wire: Any

    def text(self) -> str:
        with urllib.request.urlopen(f"http://{self.server.metrics_address}/metrics", timeout=10.0) as reply:
            assert reply.headers["Content-Type"] == metrics.CONTENT_TYPE
            return str(reply.read().decode())

    def scrape(self) -> dict[str, Family]:
        return parse(self.text())


@pytest.fixture
def run(router: Router, plane: str, socket_dir: Path, wire_to_address: Any) -> Iterator[Running]:
    options = app.Options(data_plane=plane, metrics_address="127.0.0.1:0", max_queue=8)
    server = app.Server(router, f"unix:{socket_dir}/s", options)
    with server.running() as place, Client(place, timeout_s=20.0) as client, wire_to_address(place) as wire:
        yield Running(server, client, wire)


def test_counts_are_those_of_the_calls(run: Running, router: Router, plane: str) -> None:
    before = run.scrape()
    decisions = [run.client.route(CANARY, tau=0.5) for _ in range(3)]
    run.client.route_batch([CANARY] * 5, tau=1.0)
    x = np.full((2, router.input_dim), np.nan, np.float32)
    run.client.route_batch(embeddings=x, tau=0.5)
    run.client.info()
    for request in ({"tau": 7.0}, {"tau": 0.5, "available": [CANARY]}):
        with pytest.raises(ValueError, match="expected"):
            run.client.route(CANARY, **request)  # type: ignore[arg-type]
    after = run.scrape()
    assert dict(after["proteus_calls_total"].values) == {
        ("", frozenset({("method", method), ("code", code)})): float(count)
        for method, code, count in [
            ("GetInfo", "OK", 1),
            ("Route", "INVALID_ARGUMENT", 2),
            ("Route", "OK", 3),
            ("RouteBatch", "OK", 2),
        ]
    }
    rows = after["proteus_decisions_total"]
    probe = sum(before["proteus_decisions_total"].values.values())
    assert probe == 1
    assert sum(rows.values.values()) == probe + 3 + 5 + 2
    assert rows[{"candidate": decisions[0].candidate, "status": "FEASIBLE"}] >= 3
    assert rows[{"status": "INFEASIBLE"}] == 5
    assert rows[{"candidate": "", "status": "INVALID"}] == 2
    for phase, count in [("queue", 5), ("encode", 5), ("decide", 5)]:
        name = f"proteus_{phase}_seconds"
        key = "_count", frozenset()
        assert after[name].values[key] - before[name].values[key] == count
        assert 0.0 < after[name].values["_sum", frozenset()] < 60.0
    assert after["proteus_info"][{"data_plane": plane, "router": router.versions["router"]}] == 1
    assert after["proteus_pending_calls"][{}] == after["proteus_queued_rows"][{}] == 0
    assert ("proteus_connections" in after) == (plane == "native")
    assert CANARY not in run.text()


def test_changes_are_counted_and_shown(run: Running, router: Router) -> None:
    control, name = run.server.control, router.pool.names[0]
    control.set_prices({name: 0.5})
    control.set_availability({name: False})
    control.reload("")
    with pytest.raises(ValueError, match="names"):
        control.set_prices({CANARY: 1.0})
    run.client.route(CANARY, tau=0.5)
    found = run.scrape()
    done = {kind: found["proteus_changes_total"][{"kind": kind, "outcome": "done"}] for kind in ("reload", "prices")}
    assert done == {"reload": 1, "prices": 1}
    assert found["proteus_changes_total"][{"kind": "prices", "outcome": "refused"}] == 1
    assert (found["proteus_generation"][{}], found["proteus_certified"][{}]) == (4, 0)
    assert found["proteus_candidate_available"][{"candidate": name}] == 0
    assert found["proteus_candidate_price_usd"][{"candidate": name}] == router.pool.price_usd[0]
    # counts go on through every change
    assert sum(found["proteus_decisions_total"].values.values()) == 2
    assert found["proteus_queue_seconds"].values["_count", frozenset()] == 2
    assert CANARY not in run.text()


def test_a_full_queue_is_counted(held_server: Any) -> None:
    server, wire, batcher = held_server(workers=1, max_queue=1)
    batcher.gate.clear()
    request = app.service.pb.RouteRequest(text=CANARY, tau=0.5)
    calls = [wire.start("Route", request) for _ in range(6)]
    while sum(call.done() for call in calls) < 4:
        pass
    assert server._plane.counts()["shed"] == 4
    assert server._plane.calls()["Route", "RESOURCE_EXHAUSTED"] == 4
    batcher.gate.set()
    assert sum(call.exception(timeout=10.0) is None for call in calls) == 2


def test_only_metrics_are_there(run: Running) -> None:
    with urllib.request.urlopen(f"http://{run.server.metrics_address}/metrics?collect=all", timeout=10.0) as reply:
        assert reply.status == 200
    for path in ("/", f"/{CANARY}", "/metrics/"):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"http://{run.server.metrics_address}{path}", timeout=10.0)
        assert error.value.code == 404
        assert CANARY not in error.value.read().decode()
        error.value.close()


@pytest.fixture
def endpoint(router: Router, socket_dir: Path) -> Iterator[Running]:
    """Metrics of a server, whichever its data plane."""
    server = app.Server(router, f"unix:{socket_dir}/s", app.Options(metrics_address="127.0.0.1:0"))
    with server.running():
        yield Running(server, None, None)  # type: ignore[arg-type]


def connect(running: Running) -> socket.socket:
    host, _, port = (running.server.metrics_address or "").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10.0)


def peers_of(running: Running) -> Any:
    return running.server._metrics._server._peers  # type: ignore[union-attr]


def wait_until_gone(running: Running) -> None:
    end = time.monotonic() + 10.0
    while peers_of(running):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_slow_peers_are_few_and_have_their_end(endpoint: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_PEER_S", 60.0)
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(connect(endpoint)) for _ in range(40)]
        end = time.monotonic() + 10.0
        while len(ended := select.select(peers, [], [], 0.0)[0]) < 8:
            assert time.monotonic() < end
            time.sleep(0.01)
        held = [peer for peer in peers if peer not in ended]
        threads = [thread for thread in threading.enumerate() if "process_request" in thread.name]
        assert len(threads) == len(peers_of(endpoint)) == len(held) == 32
        for peer in held:
            peer.sendall(b"GET /metrics HTTP/1.0\r\nX: ")
        # one that goes on sending has no more time than the others
        end = time.monotonic() + 10.0
        monkeypatch.setattr(metrics, "_PEER_S", 0.3)
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < end:
                held[0].sendall(b"a")
                time.sleep(0.01)
        assert time.monotonic() < end
        wait_until_gone(endpoint)
    monkeypatch.undo()
    assert endpoint.scrape()


def test_a_peer_that_goes_away_is_no_event(
    endpoint: Running, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(5):
        with connect(endpoint) as peer:
            peer.sendall(b"GET /met")
            while not peers_of(endpoint):
                time.sleep(0.001)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wait_until_gone(endpoint)
    assert caplog.records == []
    assert capfd.readouterr().err == ""


def test_a_mistake_is_one_line(
    endpoint: Running,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any) -> str:
        raise KeyError(CANARY)

    monkeypatch.setattr(metrics, "render", fail)
    with pytest.raises(ConnectionError):
        endpoint.text()
    wait_until_gone(endpoint)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage().startswith("metrics: error=type=KeyError frames=[")
    assert CANARY not in caplog.text + capfd.readouterr().err


def test_out_of_descriptors_the_loop_waits(endpoint: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def fail(_self: Any) -> Any:
        tries.append(1)
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(socketserver.TCPServer, "get_request", fail)
        with connect(endpoint):
            time.sleep(0.5)
        assert 1 <= len(tries) <= 6
    assert endpoint.scrape()


def test_labels_are_escaped() -> None:
    line = list(metrics._metric("proteus_x", "gauge", "X", [({"candidate": 'a"b\\c\nd'}, 1)]))[-1]
    assert line == 'proteus_x{candidate="a\\"b\\\\c\\nd"} 1'
    parse("\n".join(metrics._metric("proteus_x", "gauge", "X", [({"candidate": 'a"b\\c\nd'}, 1.5)])) + "\n")


def test_every_metric_is_documented(run: Running) -> None:
    rows = dict(re.findall(r"^\| `(proteus_[a-z_]+)` \| (counter|gauge|histogram) ", DOCS.read_text(), re.MULTILINE))
    found = {name: family.kind for name, family in run.scrape().items()}
    assert found.items() <= rows.items()
    if "proteus_connections" in found:
        assert found == rows
