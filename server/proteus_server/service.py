"""RouterService: requests as bytes in, replies as bytes out, every decision through the core's batcher.

Handlers take and give bytes so that a request which does not parse is refused here, like any other bad request, and
so that parsing and serialising run in the worker's thread and not in the one that polls for all calls.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import TYPE_CHECKING, Protocol

import grpc
import numpy as np
from google.protobuf.message import Message
from google.rpc import code_pb2
from numpy.typing import NDArray

from proteus_fast.batcher import ALL_CANDIDATES
from proteus_fast.certificate import Status
from proteus_fast.checkpoint import SCHEMA
from proteus_server import errors
from proteus_server import proteus_pb2 as pb
from proteus_server.control import PROBE_TEXT

if TYPE_CHECKING:
    from proteus_fast.certificate import Guarantee, Mode
    from proteus_server.control import Generation
    from proteus_server.logs import AccessLog

SERVICE_NAME = "proteus.v1.RouterService"
METHODS = ("Route", "RouteBatch", "Explain", "ReportOutcome", "GetInfo")
MAX_MESSAGE_BYTES = 8 << 20
MAX_BATCH_ROWS = 65_536
MAX_AVAILABLE = 4096
# a call without a deadline shows as one that is centuries away
_NO_DEADLINE_S = 1e6
_FLOAT_BYTES = 4
_MODES: dict[int, Mode | None] = {0: None, 1: "dual", 2: "policy"}
_GUARANTEES: dict[int, Guarantee] = {0: "certified", 1: "certified", 2: "calibrated"}

_Violations = list[tuple[str, str]]


class Context(Protocol):
    """What a handler asks of a call: grpcio's ServicerContext, or the native plane's."""

    def time_remaining(self) -> float: ...
    def is_active(self) -> bool: ...


class RouterService:
    """The handlers of what is served. Safe to call from many threads."""

    def __init__(
        self,
        generation: Generation,
        *,
        workers: int,
        queue_calls: int,
        data_plane: str = "grpcio",
        access_log: AccessLog | None = None,
    ) -> None:
        """Serve `generation`, until another is swapped in.

        Args:
            workers: calls that are worked on at once. queue_calls, data_plane: only reported.
        """
        self.draining = False
        self._slots = threading.Semaphore(workers)
        self._generation = generation
        self._queue_calls = queue_calls
        self._data_plane = data_plane
        self._access_log = access_log
        self._answered: Counter[tuple[str, str]] = Counter()
        self._counting = threading.Lock()
        self._calls: dict[str, Callable[[Generation, bytes, Context], Message]] = {
            "Route": self._route,
            "RouteBatch": self._route_batch,
            "Explain": _unimplemented,
            "ReportOutcome": _unimplemented,
            "GetInfo": self._get_info,
        }

    def prepare(self, generation: Generation) -> Callable[[], None]:
        """What makes the next calls be answered by another generation; each call takes the present one once."""

        def swap() -> None:
            self._generation = generation

        return swap

    def count(self, method: str, code: int) -> None:
        """Count a call of one of METHODS that was answered with this status."""
        with self._counting:
            self._answered[method, code_pb2.Code.Name(code)] += 1

    def calls(self) -> dict[tuple[str, str], int]:
        """Calls answered since the start, by method and status."""
        with self._counting:
            return dict(self._answered)

    def method_handlers(self, pool: futures.ThreadPoolExecutor) -> dict[str, grpc.RpcMethodHandler]:
        """One handler for each method of the service, to run in `pool`."""
        return {name: self._handler(name, pool) for name in METHODS}

    def answer(self, method: str, request: bytes, context: Context) -> bytes | errors.Refusal:
        """The reply of one of METHODS, or a refusal of the error table: nothing of an exception leaks."""
        try:
            return self._answer(method, request, context)
        except Exception as error:
            # of a count or of the access log
            return errors.refusal_of(error, method, draining=self.draining)

    def _answer(self, method: str, request: bytes, context: Context) -> bytes | errors.Refusal:
        started = time.monotonic()
        result: bytes | errors.Refusal
        reply: Message | None = None
        try:
            self._take_slot(context)
            try:
                # once: nothing of another generation gets into this reply
                reply = self._calls[method](self._generation, request, context)
                result = reply.SerializeToString()
            finally:
                self._slots.release()
        except Exception as error:
            result = errors.refusal_of(error, method, draining=self.draining)
        code = result.code if isinstance(result, errors.Refusal) else code_pb2.OK
        self.count(method, code)
        if self._access_log is not None:
            self._access_log.call(method, request, code_pb2.Code.Name(code), reply, started)
        return result

    def check(self) -> None:
        """Make one real decision, of a text where the router takes texts.

        Raises:
            RuntimeError: the decision is not a valid one; QueueFullError and TimeoutError as the batcher raises them.
        """
        served = self._generation
        texts = [PROBE_TEXT] if served.takes_text else None
        x = None if served.takes_text else np.zeros((1, served.input_dim), np.float32)
        result = served.batcher.route(texts, x, 0.5, available=ALL_CANDIDATES, deadline_s=5.0)
        choice, status = int(result.choice[0]), int(result.status[0])
        if not 0 <= choice < len(served.names) or status == Status.INVALID:
            raise RuntimeError(f"router: expected a decision, got choice {choice} with status {status}")

    def _handler(self, method: str, pool: futures.ThreadPoolExecutor) -> grpc.RpcMethodHandler:
        def handler(request: bytes, context: grpc.ServicerContext) -> bytes:
            result = self.answer(method, request, context)
            if isinstance(result, bytes):
                return result
            context.abort_with_status(errors.to_grpc(result))
            raise AssertionError  # abort has raised

        # grpcio runs a handler with this attribute in that pool: a full one keeps no health check waiting
        handler.experimental_thread_pool = pool  # type: ignore[attr-defined]
        return grpc.unary_unary_rpc_method_handler(handler)

    def _take_slot(self, context: Context) -> None:
        """Wait for one of the places to work in, at most until the call's deadline.

        grpcio gives a call its thread before the request has arrived. So there are as many threads as calls may wait,
        and this bound on those at work: a client that sends slowly, or never, holds a thread but no place.

        Raises:
            TimeoutError: the deadline has passed, or the client has left.
        """
        if self._slots.acquire(blocking=False):
            return
        if not self._slots.acquire(timeout=_remaining_s(context)):
            raise TimeoutError
        if not context.is_active():
            self._slots.release()
            raise TimeoutError

    def _route(self, served: Generation, data: bytes, context: Context) -> Message:
        remaining_s = _remaining_s(context)
        request = errors.parse(pb.RouteRequest, data)
        violations: _Violations = []
        texts: list[str] | None = None
        x: NDArray[np.float32] | None = None
        which = request.WhichOneof("input")
        if which == "text":
            texts = [request.text]
            _check_text(served, violations, "text")
        elif which == "embedding":
            x = _embeddings(served, violations, "embedding", request.embedding, 1)
        else:
            violations.append(("input", "expected text or embedding, got neither"))
        if not request.HasField("tau"):
            violations.append(("tau", "expected a number in [0, 1], got none"))
        elif not 0.0 <= request.tau <= 1.0:
            violations.append(("tau", f"expected a number in [0, 1], got {request.tau!r}"))
        available, mode, guarantee = _options(served, violations, request)
        if violations:
            raise errors.invalid(violations)
        result = served.batcher.route(
            texts, x, request.tau, mode=mode, guarantee=guarantee, available=available, deadline_s=remaining_s
        )
        choice, status = int(result.choice[0]), int(result.status[0])
        if status == Status.INVALID:
            if x is not None and not np.isfinite(x).all():
                raise errors.invalid([("embedding", "expected finite values, got NaN or infinity")])
            raise _no_candidate()
        if request.strict and status == Status.INFEASIBLE:
            raise _infeasible(request.tau, 1, _tau_max(served, mode, guarantee))
        floor = float(result.certified_floor[0])
        return pb.RouteReply(
            candidate=served.names[choice],
            choice=choice,
            mu=float(result.mu[0]),
            score=float(result.score[0]),
            status=status,  # type: ignore[arg-type]
            certified_floor=None if math.isnan(floor) else round(floor, 3),
            tau_max=_tau_max(served, mode, guarantee),
            fallbacks=_fallbacks(served, result.scores[0].tolist(), choice),
            timings=pb.Timings(queue_ns=result.queue_ns, encode_ns=result.encode_ns, decide_ns=result.decide_ns),
            versions=served.versions,
        )

    def _route_batch(self, served: Generation, data: bytes, context: Context) -> Message:
        remaining_s = _remaining_s(context)
        request = errors.parse(pb.RouteBatchRequest, data)
        violations: _Violations = []
        texts: list[str] | None = None
        x: NDArray[np.float32] | None = None
        rows = len(request.texts)
        if request.texts and request.embeddings:
            violations.append(("texts", "expected texts or embeddings, got both"))
        elif request.texts:
            _check_text(served, violations, "texts")
            if request.rows not in (0, rows):
                violations.append(("rows", f"expected {rows} as there are texts, got {request.rows}"))
            texts = list(request.texts)
        elif request.embeddings:
            rows = request.rows
            x = _embeddings(served, violations, "embeddings", request.embeddings, rows)
        else:
            violations.append(("texts", "expected texts or embeddings, got neither"))
        if rows > MAX_BATCH_ROWS:
            violations.append(("rows", f"expected at most {MAX_BATCH_ROWS}, got {rows}"))
        if len(request.tau) not in (1, rows) or not request.tau:
            expected = "1" if rows <= 1 else f"1 or {rows}"
            violations.append(("tau", f"expected {expected} values, got {len(request.tau)}"))
        available, mode, guarantee = _options(served, violations, request)
        if violations:
            raise errors.invalid(violations)
        tau = np.empty(rows, np.float64)
        tau[:] = request.tau
        result = served.batcher.route(
            texts,
            x,
            tau,
            mode=mode,
            guarantee=guarantee,
            available=available,
            deadline_s=remaining_s,
        )
        if request.strict:
            _check_strict(result.status, x, tau, _tau_max(served, mode, guarantee))
        return pb.RouteBatchReply(
            candidates=served.names,
            choice=result.choice.tolist(),
            mu=result.mu.tolist(),
            score=result.score.tolist(),
            status=result.status.tolist(),
            certified_floor=result.certified_floor.astype(np.float64).round(3).tolist(),
            tau_max=_tau_max(served, mode, guarantee),
            timings=pb.Timings(queue_ns=result.queue_ns, encode_ns=result.encode_ns, decide_ns=result.decide_ns),
            versions=served.versions,
        )

    def _get_info(self, served: Generation, data: bytes, context: Context) -> Message:
        _remaining_s(context)
        errors.parse(pb.GetInfoRequest, data)
        router = served.router
        return pb.GetInfoReply(
            candidates=[
                pb.Candidate(name=name, price_usd_per_query=price)
                for name, price in zip(served.names, served.price_usd.tolist(), strict=True)
            ],
            input_dim=served.input_dim,
            takes_text=served.takes_text,
            default_mode=pb.MODE_POLICY if router.mode == "policy" else pb.MODE_DUAL,
            delta=router.certificate.delta,
            calibration_rows=router.certificate.n,
            tau_max=router.tau_max,
            data_plane=self._data_plane,
            checkpoint_schema=SCHEMA,
            versions=served.versions,
            limits=pb.Limits(message_bytes=MAX_MESSAGE_BYTES, batch_rows=MAX_BATCH_ROWS, queue_calls=self._queue_calls),
        )


def _options(
    served: Generation, violations: _Violations, request: pb.RouteRequest | pb.RouteBatchRequest
) -> tuple[int, Mode | None, Guarantee]:
    """The bit mask of `available`, the mode and the guarantee."""
    names: Sequence[str] = request.available
    if len(names) > MAX_AVAILABLE:
        violations.append(("available", f"expected at most {MAX_AVAILABLE} names, got {len(names)}"))
        names = ()
    available = 0 if names else ALL_CANDIDATES
    for index, name in enumerate(names):
        bit = served.bit.get(name)
        if bit is None:
            violations.append((f"available[{index}]", "expected a candidate of the pool, got an unknown name"))
        else:
            available |= bit
    if request.mode not in _MODES:
        violations.append(("mode", f"expected 0, 1 or 2, got {request.mode}"))
    elif request.mode == pb.MODE_POLICY and not served.has_policy:
        violations.append(("mode", "expected MODE_DUAL, got MODE_POLICY: this router has no policy network"))
    if request.guarantee not in _GUARANTEES:
        violations.append(("guarantee", f"expected 0, 1 or 2, got {request.guarantee}"))
    return available, _MODES.get(request.mode), _GUARANTEES.get(request.guarantee, "certified")


def _check_text(served: Generation, violations: _Violations, field: str) -> None:
    if not served.takes_text:
        violations.append((field, "expected an embedding: this router encodes no text"))


def _embeddings(
    served: Generation, violations: _Violations, field: str, data: bytes, rows: int
) -> NDArray[np.float32] | None:
    """(rows, D) float32 over the request's bytes, no copy; None with a violation where the length is another."""
    expected = rows * served.input_dim * _FLOAT_BYTES
    if len(data) != expected or not rows:
        text = f"expected {expected} bytes ({rows} x {served.input_dim} float32, little-endian), got {len(data)}"
        violations.append(("rows", "expected the number of embeddings, got 0") if not rows else (field, text))
        return None
    return np.frombuffer(data, "<f4").reshape(rows, served.input_dim)


def _tau_max(served: Generation, mode: Mode | None, guarantee: Guarantee) -> float | None:
    return served.router.certificate.tau_max(mode or served.router.mode, guarantee)


def _check_strict(
    status: NDArray[np.uint8],
    x: NDArray[np.float32] | None,
    tau: NDArray[np.float64],
    tau_max: float | None,
) -> None:
    """Refuse a batch with an INVALID row, which is named, or with an INFEASIBLE one."""
    invalid = np.flatnonzero(status == Status.INVALID)
    if invalid.size:
        row = int(invalid[0])
        if not 0.0 <= tau[row] <= 1.0:
            raise errors.invalid([(f"tau[{row}]", f"expected a number in [0, 1], got {float(tau[row])!r}")])
        if x is not None and not np.isfinite(x[row]).all():
            raise errors.invalid([(f"embeddings[{row}]", "expected finite values, got NaN or infinity")])
        raise _no_candidate()
    infeasible = np.flatnonzero(status == Status.INFEASIBLE)
    if infeasible.size:
        raise _infeasible(float(tau[infeasible[0]]), infeasible.size, tau_max)


def _fallbacks(served: Generation, scores: Sequence[float], choice: int) -> list[str]:
    """The other eligible candidates, best score first, the lowest index where scores tie."""
    others = [index for index, score in enumerate(scores) if index != choice and score > -math.inf]
    others.sort(key=lambda index: -scores[index])
    return [served.names[index] for index in others]


def _no_candidate() -> errors.Refusal:
    return errors.precondition("NO_CANDIDATE", "available: expected an eligible candidate, got none")


def _infeasible(tau: float, rows: int, tau_max: float | None) -> errors.Refusal:
    metadata = {"rows": str(rows)} if tau_max is None else {"rows": str(rows), "tau_max": f"{tau_max:g}"}
    expected = "another mode: this one certifies no target" if tau_max is None else f"at most {tau_max:g} (tau_max)"
    return errors.precondition("INFEASIBLE", f"tau: expected {expected}, got {tau!r}", metadata)


def _unimplemented(_served: Generation, _data: bytes, _context: Context) -> Message:
    raise errors.unimplemented()


def _remaining_s(context: Context) -> float | None:
    """Seconds until the call's deadline; None: it has none.

    Raises:
        TimeoutError: the deadline has passed.
    """
    remaining_s = float(context.time_remaining())
    if remaining_s <= 0.0:
        raise TimeoutError
    return remaining_s if remaining_s < _NO_DEADLINE_S else None
