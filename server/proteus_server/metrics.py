"""Counts and durations in Prometheus' text format 0.0.4, read when they are asked for from where they are counted.

docs/operations.md has the table of names. Every label is bounded: by the pools that were served, by the methods and
statuses of the contract, or it describes what is served now.
"""

from __future__ import annotations

import contextlib
import http.server
import logging
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from proteus_fast import __version__
from proteus_fast.certificate import Status
from proteus_server import address as addresses
from proteus_server import errors, logs

if TYPE_CHECKING:
    from proteus_server.control import Control

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PHASES = ("queue", "encode", "decide")
_PHASE_TEXT = {
    "queue": "Time of a call until its batch began",
    "encode": "Time to encode a batch",
    "decide": "Time to decide a batch",
}
# of the core's buckets, four an octave: more would be lines that nobody reads
_BUCKETS_APART = 4
# from a connection's first byte to its last
_PEER_S = 5.0
_MOST_PEERS = 32
_POLL_S = 0.1

_log = logging.getLogger("proteus_server")

Labels = Mapping[str, str]
Times = Mapping[str, NDArray[np.uint64]]


class Plane(Protocol):
    """What metrics read of a data plane."""

    @property
    def pending(self) -> int: ...
    def calls(self) -> dict[tuple[str, str], int]: ...
    def counts(self) -> dict[str, int]: ...
    def times(self) -> dict[str, NDArray[np.uint64]] | None: ...


def render(control: Control, plane: Plane, data_plane: str) -> str:
    """All metrics as text."""
    return "\n".join(_lines(control, plane, data_plane)) + "\n"


def _lines(control: Control, plane: Plane, data_plane: str) -> Iterator[str]:
    served = control.generation
    stats, counts = served.batcher.stats(), plane.counts()
    info = {name: getattr(served.versions, name) for name in ("router", "prices", "certificate", "availability")}
    yield from _metric("proteus_build_info", "gauge", "The package", [({"version": __version__}, 1)])
    yield from _metric("proteus_info", "gauge", "What is served", [({"data_plane": data_plane, **info}, 1)])
    yield from _metric("proteus_generation", "gauge", "Changes of what is served, from 1", [({}, served.number)])
    yield from _metric(
        "proteus_certified", "gauge", "1 where the certificate covers prices and candidates", [({}, served.certified)]
    )
    yield from _metric(
        "proteus_candidate_available",
        "gauge",
        "1 where the candidate may answer",
        [({"candidate": name}, served.available & bit != 0) for name, bit in served.bit.items()],
    )
    yield from _metric(
        "proteus_candidate_price_usd",
        "gauge",
        "Mean cost of one query that scores use",
        [({"candidate": name}, price) for name, price in zip(served.names, served.price_usd.tolist(), strict=True)],
    )
    yield from _metric(
        "proteus_changes_total",
        "counter",
        "Changes asked for, by kind and outcome",
        [
            ({"kind": kind, "outcome": outcome}, control.changes[kind, outcome])
            for kind in ("reload", "prices", "availability")
            for outcome in ("done", "refused")
        ],
    )
    yield from _metric(
        "proteus_calls_total",
        "counter",
        "Calls answered, by method and status",
        [({"method": method, "code": code}, count) for (method, code), count in sorted(plane.calls().items())],
    )
    yield from _metric(
        "proteus_decisions_total",
        "counter",
        "Rows decided, by candidate (none where INVALID) and status",
        [
            ({"candidate": name, "status": Status(status).name}, count)
            for (name, status), count in sorted(control.decisions().items())
            if status in _STATUSES
        ],
    )
    yield from _metric("proteus_pending_calls", "gauge", "Calls at work or waiting", [({}, plane.pending)])
    yield from _metric("proteus_queued_rows", "gauge", "Rows that wait for a batch", [({}, stats["queued_rows"])])
    yield from _metric(
        "proteus_shed_total", "counter", "Calls refused without a place", [({}, counts["shed"] + stats["rejected"])]
    )
    yield from _metric(
        "proteus_expired_total",
        "counter",
        "Calls dropped before they were computed: late, or nobody waits",
        [({}, counts.get("expired", 0) + stats["expired"])],
    )
    if "connections" in counts:
        yield from _metric("proteus_connections", "gauge", "Connections open", [({}, counts["connections"])])
        yield from _metric(
            "proteus_connections_total",
            "counter",
            "Connections, by outcome",
            [
                ({"outcome": "accepted"}, counts["accepted"]),
                ({"outcome": "refused"}, counts["refused_connections"]),
            ],
        )
    times = [served.batcher.times()]
    of_plane = plane.times()
    for index, phase in enumerate(_PHASES):
        all_times = times if of_plane is None else [*times, of_plane]
        yield from _histogram(
            f"proteus_{phase}_seconds",
            _PHASE_TEXT[phase],
            times[0]["bound_ns"],
            sum(one[phase] for one in all_times),
            sum(int(one["sum_ns"][index]) for one in all_times),
        )


_STATUSES = {status.value for status in Status}


def _metric(name: str, kind: str, text: str, values: Iterable[tuple[Labels, float]]) -> Iterator[str]:
    yield f"# HELP {name} {text}."
    yield f"# TYPE {name} {kind}"
    for labels, value in values:
        yield f"{name}{_braces(labels)} {_number(value)}"


def _histogram(
    name: str, text: str, bound_ns: NDArray[np.uint64], counts: NDArray[np.uint64] | int, sum_ns: int
) -> Iterator[str]:
    cumulated, bounds = np.cumsum(counts).tolist(), bound_ns.tolist()
    yield f"# HELP {name} {text}."
    yield f"# TYPE {name} histogram"
    # the last bucket has no bound
    for bucket in range(0, len(cumulated) - 1, _BUCKETS_APART):
        yield f'{name}_bucket{{le="{bounds[bucket] / 1e9!r}"}} {cumulated[bucket]}'
    yield f'{name}_bucket{{le="+Inf"}} {cumulated[-1]}'
    yield f"{name}_sum {_number(sum_ns / 1e9)}"
    yield f"{name}_count {cumulated[-1]}"


def _braces(labels: Labels) -> str:
    if not labels:
        return ""
    escaped = (
        (name, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for name, value in labels.items()
    )
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}"


def _number(value: float) -> str:
    return str(int(value)) if isinstance(value, bool | int) else repr(float(value))


class Endpoint:
    """`GET /metrics` over HTTP, by threads of its own."""

    def __init__(self, control: Control, plane: Plane, data_plane: str, address: str, *, insecure: bool) -> None:
        """Prepare an endpoint; nothing is bound yet.

        Raises:
            ValueError: the address is no HOST:PORT, or is reachable from other machines without `insecure`.
            OSError: its host does not resolve.
        """
        self._address = checked(address, insecure=insecure)

        class Handler(_Handler):
            def text(self) -> str:
                return render(control, plane, data_plane)

        self._handler = Handler
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> str:
        """Bind and serve. Returns the address with its real port.

        Raises:
            OSError: the address cannot be bound.
        """
        host, port = self._address.host, self._address.port
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]

        class Server(_Server):
            address_family = family

        try:
            self._server = Server((host, port), self._handler)
        except OSError as error:
            raise OSError(f"metrics_address: cannot bind {self._address.target}: {error.strerror}") from None
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_S,), name="proteus-metrics", daemon=True
        )
        self._thread.start()
        return addresses.Address(host, self._server.server_address[1], None).target

    def stop(self) -> None:
        """Answer no more."""
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._server.end_peers(0.0)


def checked(address: str, *, insecure: bool) -> addresses.Address:
    """Read the address of an Endpoint; see there."""
    found = addresses.checked(address, insecure=insecure, argument="metrics_address")
    if found.path is not None:
        raise ValueError(f"metrics_address: expected HOST:PORT, got {address!r}")
    return found


class _Server(http.server.ThreadingHTTPServer):
    """A bounded number of connections, each for a bounded time, of which none puts anything but a line into the log."""

    request_queue_size = _MOST_PEERS

    def __init__(self, *arguments: Any) -> None:
        self._lock = threading.Lock()
        self._peers: dict[Any, float] = {}
        super().__init__(*arguments)

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:
            # out of descriptors: the connection waits, and the loop would come back at once
            time.sleep(_POLL_S)
            raise

    def verify_request(self, request: Any, _address: Any) -> bool:
        with self._lock:
            if len(self._peers) >= _MOST_PEERS:
                return False
            self._peers[request] = time.monotonic()
        return True

    def service_actions(self) -> None:
        self.end_peers(_PEER_S)

    def end_peers(self, older_s: float) -> None:
        """End the connections that are as old; their threads end with them."""
        now = time.monotonic()
        # a thread that ends closes its descriptor only once it is not in here
        with self._lock:
            for peer, since in self._peers.items():
                if now - since >= older_s:
                    with contextlib.suppress(OSError):
                        peer.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._peers.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, _request: Any, _address: Any) -> None:
        error = sys.exc_info()[1]
        # a peer that has gone away is no event
        if error is not None and not isinstance(error, OSError):
            logs.event(_log, logging.ERROR, "metrics", error=errors.describe(error))


class _Handler(http.server.BaseHTTPRequestHandler):
    def text(self) -> str:
        raise NotImplementedError

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404)
            return
        body = self.text().encode()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: what a peer sends is in no log."""
