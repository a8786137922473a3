"""The portable data plane: grpcio's server answers everything."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from proteus_server import arrivals, errors, service

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PREFIX = f"/{service.SERVICE_NAME}/"
# health checks, reflection and refusals: each with a thread, so that they wait behind nobody
_CONTROL_CALLS = 256
_MOST_ARRIVING = 32
_POLL_S = 0.02
_LAST_REPLIES_S = 0.5
_CHANNEL_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", service.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", service.MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", 1024),
    # a peer that is gone is noticed within 80 s; a client may ask as often as every 10 s
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)


def _age_options(seconds: float) -> tuple[tuple[str, int], ...]:
    if not seconds:
        return ()
    return ("grpc.max_connection_age_ms", max(1, int(1000 * seconds))), ("grpc.max_connection_age_grace_ms", 10_000)


class GrpcioPlane:
    """Threads for calls, and grpcio's server in front of them."""

    def __init__(self, router_service: service.RouterService, limit: int, max_connection_age_s: float = 0.0) -> None:
        self._control = futures.ThreadPoolExecutor(_CONTROL_CALLS, "proteus-control")
        # a thread for each call that is in: those that wait, for their request or for a place, cost no time
        self._pool = _CountingPool(limit)
        self._service = router_service
        self._admission = _Admission(self._pool, limit, router_service)
        # before they have taken all places
        self._arrivals = arrivals.Arrivals(min(limit // 2, _MOST_ARRIVING))
        self._server = grpc.server(
            self._control,
            interceptors=(self._arrivals, self._admission),
            options=(*_CHANNEL_OPTIONS, *_age_options(max_connection_age_s)),
            maximum_concurrent_rpcs=limit + _CONTROL_CALLS,
        )
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._server.add_registered_method_handlers(service.SERVICE_NAME, router_service.method_handlers(self._pool))
        reflection.enable_server_reflection(
            (service.SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )

    def add_port(self, target: str) -> int:
        return int(self._server.add_insecure_port(target))

    def start(self) -> None:
        self._arrivals.start()
        self._server.start()

    def set_health(self, names: Sequence[str], status: int) -> None:
        for name in names:
            self._health.set(name, status)

    @property
    def pending(self) -> int:
        return self._pool.pending

    def calls(self) -> dict[tuple[str, str], int]:
        """RouterService's calls answered since the start, by method and status."""
        return self._service.calls()

    def counts(self) -> dict[str, int]:
        """Calls without a place (shed)."""
        return {"shed": self._admission.shed}

    def times(self) -> dict[str, NDArray[np.uint64]] | None:
        """None: the batcher has them all."""
        return None

    def refuse_new(self) -> None:
        self._admission.draining = True

    def drain(self, end: float, hurry: Callable[[], bool]) -> int:
        """Let calls end until a time of time.monotonic(), or until they are hurried. How many have not ended."""
        while self._pool.pending and time.monotonic() < end and not hurry():
            time.sleep(_POLL_S)
        return self._pool.pending

    def stop(self, seconds: float) -> None:
        """Stop, once replies are on their way or after so many seconds: health watchers never end by themselves."""
        self._server.stop(min(_LAST_REPLIES_S, seconds)).wait()
        self._arrivals.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._control.shutdown(wait=False, cancel_futures=True)


class _CountingPool(futures.ThreadPoolExecutor):
    """A pool that knows how many calls it holds, running or waiting."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads, "proteus-route")
        self._count_lock = threading.Lock()
        self._pending = 0

    @property
    def pending(self) -> int:
        return self._pending

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> futures.Future[Any]:
        future = super().submit(fn, *args, **kwargs)
        with self._count_lock:
            self._pending += 1
        future.add_done_callback(self._one_less)
        return future

    def _one_less(self, _future: futures.Future[Any]) -> None:
        with self._count_lock:
            self._pending -= 1


class _Admission(grpc.ServerInterceptor):  # type: ignore[misc]
    """Refuse RouterService's calls at once while draining or with a full queue; let health and reflection pass."""

    def __init__(self, pool: _CountingPool, limit: int, router_service: service.RouterService) -> None:
        self.draining = False
        # one thread of grpcio calls the interceptor
        self.shed = 0
        self._pool = pool
        self._limit = limit
        self._service = router_service
        self._unavailable = errors.unavailable()
        self._overloaded = errors.overloaded()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        if handler_call_details.method.startswith(_PREFIX):
            method = handler_call_details.method.removeprefix(_PREFIX)
            if self.draining:
                return self._refuse(method, self._unavailable)
            if self._pool.pending >= self._limit:
                self.shed += 1
                return self._refuse(method, self._overloaded)
        return continuation(handler_call_details)

    def _refuse(self, method: str, refusal: errors.Refusal) -> grpc.RpcMethodHandler:
        if method in service.METHODS:
            self._service.count(method, refusal.code)
        return _refuse_with(refusal)


def _refuse_with(refusal: errors.Refusal) -> grpc.RpcMethodHandler:
    """A handler that refuses every call without waiting for its request; it runs in the control pool."""
    status = errors.to_grpc(refusal)

    def handler(_requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        context.abort_with_status(status)
        raise AssertionError  # abort has raised

    return grpc.stream_unary_rpc_method_handler(handler)
