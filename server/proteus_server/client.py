"""A client of the server. It needs neither torch nor a checkpoint.

    with Client("unix:/run/proteus.sock") as client:
        print(client.route("Which gas do plants take in?", tau=0.85).candidate)

What the server refuses comes back as the exception that the same mistake raises in process: ValueError for a bad
argument, an infeasible target under `strict` or an oversized request, QueueFullError where the server is overloaded,
TimeoutError past the deadline, ConnectionError where no server answers or it is draining, NotImplementedError for a
method of a later version, RuntimeError with a reference number for the server's own mistakes; a closed client raises
RuntimeError too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
import numpy as np
from grpc_health.v1 import health_pb2
from numpy.typing import ArrayLike, NDArray

from proteus_fast.certificate import Status
from proteus_server import errors
from proteus_server import proteus_pb2 as pb

if TYPE_CHECKING:
    from typing_extensions import Self

_SERVICE = "proteus.v1.RouterService"
_MAX_REPLY_BYTES = 16 << 20
_NO_DEADLINE_S = 3e7
_MODES = {None: pb.MODE_UNSPECIFIED, "dual": pb.MODE_DUAL, "policy": pb.MODE_POLICY}
_GUARANTEES = {"certified": pb.GUARANTEE_CERTIFIED, "calibrated": pb.GUARANTEE_CALIBRATED}
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_REPLY_BYTES),
    # a client that was there before its server finds it soon
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # two clients share nothing, neither a connection nor its backoff
    ("grpc.use_local_subchannel_pool", 1),
)


class Timings(NamedTuple):
    """Where the server spent a call's time, in nanoseconds."""

    queue_ns: int
    encode_ns: int
    decide_ns: int


class Versions(NamedTuple):
    """What decided: hashes of the checkpoint, of the prices, of the certificate and of who may answer.

    `generation` counts the server's changes, from 1.
    """

    router: str
    prices: str
    certificate: str
    availability: str
    generation: int


class Decision(NamedTuple):
    """One query's decision."""

    candidate: str
    choice: int
    mu: float
    score: float
    status: Status
    certified_floor: float | None
    tau_max: float | None
    fallbacks: tuple[str, ...]
    timings: Timings
    versions: Versions


class Decisions(NamedTuple):
    """Many queries' decisions, one row each.

    choice (B,) int32, -1 where INVALID; mu, score (B,) float32; status (B,) uint8; certified_floor (B,) float64, NaN
    where there is none. `candidates` are the names that choice indexes.
    """

    choice: NDArray[np.int32]
    mu: NDArray[np.float32]
    score: NDArray[np.float32]
    status: NDArray[np.uint8]
    certified_floor: NDArray[np.float64]
    candidates: tuple[str, ...]
    tau_max: float | None
    timings: Timings
    versions: Versions


class Limits(NamedTuple):
    """What the server takes at most."""

    message_bytes: int
    batch_rows: int
    queue_calls: int


class Info(NamedTuple):
    """What the server has loaded. `price_usd` is the mean cost of one query, in the order of `candidates`."""

    candidates: tuple[str, ...]
    price_usd: tuple[float, ...]
    input_dim: int
    takes_text: bool
    default_mode: str
    delta: float
    calibration_rows: int
    tau_max: float | None
    data_plane: str
    checkpoint_schema: int
    versions: Versions
    limits: Limits


class Client:
    """One connection to a server, made when first needed and again when it broke. Safe to call from many threads."""

    def __init__(self, address: str, timeout_s: float = 1.0) -> None:
        """Args:
        address: HOST:PORT or unix:PATH, in cleartext.
        timeout_s: every call's deadline unless it has its own; infinity: none.
        """
        self._timeout_s = _timeout(timeout_s)
        if not timeout_s > 0.0:
            raise ValueError(f"timeout_s: expected more than 0, got {timeout_s}")
        self._closed = False
        self._channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._route = self._method(f"/{_SERVICE}/Route", pb.RouteReply)
        self._route_batch = self._method(f"/{_SERVICE}/RouteBatch", pb.RouteBatchReply)
        self._get_info = self._method(f"/{_SERVICE}/GetInfo", pb.GetInfoReply)
        self._check = self._method("/grpc.health.v1.Health/Check", health_pb2.HealthCheckResponse)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        self._closed = True
        self._channel.close()

    def route(
        self,
        text: str | None = None,
        *,
        tau: float,
        embedding: ArrayLike | None = None,
        available: Iterable[str] | None = None,
        strict: bool = False,
        mode: str | None = None,
        guarantee: str = "certified",
        timeout_s: float | None = None,
    ) -> Decision:
        """Which candidate should answer one query.

        Args:
            text: the query; either this or `embedding`, (D,) float32 as the router's `encode` gives it.
            tau: accuracy target in [0, 1].
            available: names of the candidates that may answer; None, or none at all: all.
            strict: raise where the target is infeasible.
            mode: dual | policy; None: the checkpoint's. guarantee: certified | calibrated.

        Raises:
            TypeError, ValueError, QueueFullError, TimeoutError, ConnectionError, RuntimeError: see the module.
        """
        if (text is None) == (embedding is None):
            raise ValueError(f"text: expected text or embedding, got {'neither' if text is None else 'both'}")
        request = pb.RouteRequest(
            text=None if text is None else _text("text", text),
            embedding=None if embedding is None else _float_bytes("embedding", embedding, 1),
            tau=_target("tau", tau),
            available=_texts("available", available),
            strict=strict,
            mode=_number("mode", _MODES, mode),
            guarantee=_number("guarantee", _GUARANTEES, guarantee),
        )
        reply = self._call(self._route, request, timeout_s)
        return Decision(
            reply.candidate,
            reply.choice,
            reply.mu,
            reply.score,
            Status(reply.status),
            reply.certified_floor if reply.HasField("certified_floor") else None,
            reply.tau_max if reply.HasField("tau_max") else None,
            tuple(reply.fallbacks),
            _timings(reply.timings),
            _versions(reply.versions),
        )

    def route_batch(
        self,
        texts: Sequence[str] | None = None,
        *,
        tau: float | ArrayLike,
        embeddings: ArrayLike | None = None,
        available: Iterable[str] | None = None,
        strict: bool = False,
        mode: str | None = None,
        guarantee: str = "certified",
        timeout_s: float | None = None,
    ) -> Decisions:
        """`route` for many queries in one call.

        `texts`, or `embeddings` (B, D) float32, at least one; `tau` is one target, or one for each row, (B,). A row
        with a bad value (NaN, a target outside [0, 1]) has status INVALID; the others are not affected.
        """
        if (texts is None) == (embeddings is None):
            raise ValueError(f"texts: expected texts or embeddings, got {'neither' if texts is None else 'both'}")
        prompts = None if texts is None else _texts("texts", texts)
        x = None if embeddings is None else np.asarray(embeddings)
        data = None if x is None else _float_bytes("embeddings", x, 2)
        rows = len(prompts) if prompts is not None else len(x) if x is not None else 0
        if rows == 0:
            raise ValueError(f"{'texts' if x is None else 'embeddings'}: expected at least one, got none")
        request = pb.RouteBatchRequest(
            texts=prompts,
            embeddings=data,
            rows=rows,
            tau=_targets("tau", tau),
            available=_texts("available", available),
            strict=strict,
            mode=_number("mode", _MODES, mode),
            guarantee=_number("guarantee", _GUARANTEES, guarantee),
        )
        reply = self._call(self._route_batch, request, timeout_s)
        return Decisions(
            np.array(reply.choice, np.int32),
            np.array(reply.mu, np.float32),
            np.array(reply.score, np.float32),
            np.array(reply.status, np.uint8),
            np.array(reply.certified_floor, np.float64),
            tuple(reply.candidates),
            reply.tau_max if reply.HasField("tau_max") else None,
            _timings(reply.timings),
            _versions(reply.versions),
        )

    def info(self, *, timeout_s: float | None = None) -> Info:
        """What the server has loaded, and its limits."""
        reply = self._call(self._get_info, pb.GetInfoRequest(), timeout_s)
        limits = reply.limits
        return Info(
            tuple(candidate.name for candidate in reply.candidates),
            tuple(candidate.price_usd_per_query for candidate in reply.candidates),
            reply.input_dim,
            reply.takes_text,
            "policy" if reply.default_mode == pb.MODE_POLICY else "dual",
            reply.delta,
            reply.calibration_rows,
            reply.tau_max if reply.HasField("tau_max") else None,
            reply.data_plane,
            reply.checkpoint_schema,
            _versions(reply.versions),
            Limits(limits.message_bytes, limits.batch_rows, limits.queue_calls),
        )

    def healthy(self, *, timeout_s: float | None = None) -> bool:
        """Whether the server answers and says that its router is ready."""
        try:
            reply = self._send(self._check, health_pb2.HealthCheckRequest(service=_SERVICE), timeout_s)
        except grpc.RpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def _method(self, name: str, reply: Any) -> Callable[..., Any]:
        method: Callable[..., Any] = self._channel.unary_unary(
            name, request_serializer=_serialize, response_deserializer=reply.FromString
        )
        return method

    def _call(self, method: Callable[..., Any], request: Any, timeout_s: float | None) -> Any:
        try:
            return self._send(method, request, timeout_s)
        except grpc.RpcError as error:
            raise errors.exception_of(error) from error

    def _send(self, method: Callable[..., Any], request: Any, timeout_s: float | None) -> Any:
        timeout = self._timeout_s if timeout_s is None else _timeout(timeout_s)
        try:
            return method(request, timeout=timeout)
        except ValueError:
            if self._closed:
                raise RuntimeError("client: closed") from None
            raise


def _timeout(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, float | int | np.floating | np.integer):
        raise TypeError(f"timeout_s: expected a number, got {type(value).__name__}")
    if not -math.inf <= value <= math.inf:
        raise ValueError("timeout_s: expected a number of seconds, got nan")
    # beyond a year there is no deadline; the transport's clock would take it for one that has passed
    return None if value >= _NO_DEADLINE_S else float(value)


def _serialize(request: Any) -> bytes:
    data: bytes = request.SerializeToString()
    return data


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        # the error itself would carry the whole text
        raise ValueError(f"{name}: expected text that UTF-8 can hold, got a lone surrogate") from None
    return value


def _texts(name: str, values: object) -> list[str]:
    if values is None:
        return []
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected a sequence of str, got one {type(values).__name__}")
    return [_text(f"{name}[{i}]", value) for i, value in enumerate(values)]


def _target(name: str, value: object) -> float | None:
    # the server says that a target is missing
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, float | int | np.floating | np.integer):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return float(value)


def _targets(name: str, values: ArrayLike) -> list[float]:
    targets = np.atleast_1d(np.asarray(values))
    if targets.ndim > 1:
        raise ValueError(f"{name}: expected one number or shape (B,), got shape {targets.shape}")
    if targets.dtype.kind not in "fiu":
        raise TypeError(f"{name}: expected numbers, got {targets.dtype}")
    return [float(target) for target in targets]


def _float_bytes(name: str, values: ArrayLike, ndim: int) -> bytes:
    x = np.asarray(values)
    if x.ndim != ndim or x.dtype.kind not in "fiu":
        raise ValueError(f"{name}: expected {ndim} dimension(s) of real numbers, got {x.ndim} of {x.dtype}")
    return x.astype("<f4", copy=False).tobytes()


def _number(name: str, numbers: dict[Any, Any], value: str | None) -> Any:
    if value not in numbers:
        known = " | ".join(str(key) for key in numbers)
        raise ValueError(f"{name}: expected {known}, got {value!r}")
    return numbers[value]


def _timings(timings: pb.Timings) -> Timings:
    return Timings(timings.queue_ns, timings.encode_ns, timings.decide_ns)


def _versions(versions: pb.Versions) -> Versions:
    return Versions(versions.router, versions.prices, versions.certificate, versions.availability, versions.generation)
