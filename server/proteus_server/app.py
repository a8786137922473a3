"""The server's life: load, bind, serve, drain."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from proteus_fast._core import Batcher, QueueFullError
from proteus_server import address as addresses
from proteus_server import errors, service

if TYPE_CHECKING:
    from typing_extensions import Self

    from proteus_fast.router import Router

_log = logging.getLogger("proteus_server")
_LOG_LEVELS = ("debug", "info", "warning", "error")
_PREFIX = f"/{service.SERVICE_NAME}/"
# health checks, reflection and refusals: never behind a full queue of decisions
_CONTROL_THREADS = 8
_CONTROL_CALLS = 256
_HEALTH_PERIOD_S = 10.0
_POLL_S = 0.02
# calls that were on the wire when the drain began are still taken
_ON_THE_WIRE_S = 0.1
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


@dataclass(frozen=True)
class Options:
    """What can be set on a server; the defaults suit two cores."""

    insecure: bool = False
    max_queue: int = 256
    max_batch_size: int = 256
    workers: int = 8
    drain_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name in ("max_queue", "max_batch_size", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0.0 <= self.drain_seconds <= 3600.0:
            raise ValueError(f"drain_seconds: expected 0 to 3600, got {self.drain_seconds}")


class Server:
    """One router behind one address. `start`, then `drain`; `running` does both."""

    def __init__(self, router: Router, address: str, options: Options | None = None) -> None:
        """Prepare a server; nothing is bound yet.

        Raises:
            ValueError: the address is none, or is reachable from other machines without `insecure`.
            OSError: the address's host does not resolve.
        """
        self._options = options = options or Options()
        self._address = addresses.checked(address, insecure=options.insecure)
        self._batcher = Batcher(
            router.snapshot, max_batch_size=options.max_batch_size, max_queue_rows=service.MAX_BATCH_ROWS
        )
        self._service = service.RouterService(
            router, self._batcher, workers=options.workers, queue_calls=options.max_queue
        )
        self._control = futures.ThreadPoolExecutor(_CONTROL_THREADS, "proteus-control")
        # a thread for each call that is in: those that wait, for their request or for a place, cost no time
        limit = options.workers + options.max_queue
        self._pool = _CountingPool(limit)
        self._admission = _Admission(self._pool, limit)
        self._server = grpc.server(
            self._control,
            interceptors=(self._admission,),
            options=_CHANNEL_OPTIONS,
            maximum_concurrent_rpcs=limit + _CONTROL_CALLS,
        )
        self._health = health.HealthServicer()
        self._set_health(ready=False)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._server.add_registered_method_handlers(service.SERVICE_NAME, self._service.method_handlers(self._pool))
        reflection.enable_server_reflection(
            (service.SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )
        self._stopping = threading.Event()
        self._exit = contextlib.ExitStack()
        self._monitor = threading.Thread(target=self._watch_health, name="proteus-health", daemon=True)

    def start(self) -> str:
        """Bind, serve, and make one real decision before health says SERVING. Returns the address with its real port.

        Raises:
            OSError: the address cannot be bound.
            RuntimeError: the router makes no valid decision.
        """
        try:
            place = self._exit.enter_context(addresses.bound(self._address, self._server.add_insecure_port))
            self._server.start()
            self._service.check()
        except BaseException:
            self.drain(0.0)
            raise
        self._set_health(ready=True)
        self._monitor.start()
        return place

    def drain(self, seconds: float | None = None, *, hurry: Callable[[], bool] = lambda: False) -> int:
        """Refuse new calls, let those in flight finish, stop.

        Args:
            seconds: how long those in flight may take; None: the option's.
            hurry: true once the rest shall be cut off at once.

        Returns:
            How many calls were cut off.
        """
        end = time.monotonic() + (self._options.drain_seconds if seconds is None else seconds)
        self._stopping.set()
        self._health.enter_graceful_shutdown()
        time.sleep(max(0.0, min(_ON_THE_WIRE_S, end - time.monotonic())))
        self._service.draining = self._admission.draining = True
        while self._pool.pending and time.monotonic() < end and not hurry():
            time.sleep(_POLL_S)
        cut_off = self._pool.pending
        self._batcher.close(drain=not cut_off)
        # what is left are replies on their way out, and health watchers, which never end by themselves
        self._server.stop(min(0.5, max(0.0, end - time.monotonic()))).wait()
        self._exit.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._control.shutdown(wait=False, cancel_futures=True)
        return cut_off

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """Serve inside a `with` block; gives the address."""
        place = self.start()
        try:
            yield place
        finally:
            self.drain()

    def _set_health(self, *, ready: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in (health.OVERALL_HEALTH, service.SERVICE_NAME):
            self._health.set(name, status)

    def _watch_health(self) -> None:
        """Decide again every few seconds: health is what the router does, not what it did at the start."""
        ready = True
        while not self._stopping.wait(_HEALTH_PERIOD_S):
            was_ready, reason = ready, self._why_not_ready()
            ready = reason is None
            if ready == was_ready or self._stopping.is_set():
                continue
            self._set_health(ready=ready)
            if ready:
                _log.info("health: ready")
            else:
                _log.error("health: not ready: %s", reason)

    def _why_not_ready(self) -> str | None:
        try:
            self._service.check()
        except QueueFullError:
            # overloaded, which is not unhealthy
            return None
        except Exception as error:
            return errors.describe(error)
        return None


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

    def __init__(self, pool: _CountingPool, limit: int) -> None:
        self.draining = False
        self._pool = pool
        self._limit = limit
        self._unavailable = _refuse_with(errors.unavailable())
        self._overloaded = _refuse_with(errors.overloaded())

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        if handler_call_details.method.startswith(_PREFIX):
            if self.draining:
                return self._unavailable
            if self._pool.pending >= self._limit:
                return self._overloaded
        return continuation(handler_call_details)


def _refuse_with(refusal: errors.Refusal) -> grpc.RpcMethodHandler:
    """A handler that refuses every call; it runs in the control pool."""
    status = errors.to_grpc(refusal)

    def handler(_request: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort_with_status(status)
        raise AssertionError  # abort has raised

    return grpc.unary_unary_rpc_method_handler(handler)


class _Signals:
    """Count SIGTERM and SIGINT inside a `with` block of the main thread."""

    def __init__(self) -> None:
        self.count = 0
        self._arrived = threading.Event()

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._arrive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self) -> None:
        self._arrived.wait()

    def _arrive(self, _number: int, _frame: object) -> None:
        self.count += 1
        self._arrived.set()


def serve(checkpoint: str | None, address: str, options: Options | None = None, *, log_level: str | None = None) -> int:
    """Serve until SIGTERM or SIGINT; a second signal ends the drain. Prints `listening on ADDRESS` when ready.

    Args:
        checkpoint: a checkpoint's folder; None: the embedded router.
        address: HOST:PORT (port 0: any free one) or unix:PATH.
        log_level: debug | info | warning | error; None: $PROTEUS_LOG, else info.

    Returns:
        The exit status: 0 after a drain, 1 where the checkpoint does not load or the address is not to be had, 2 for
        wrong usage.
    """
    options = options or Options()
    level = log_level or os.environ.get("PROTEUS_LOG") or "info"
    if level not in _LOG_LEVELS:
        return _fail(f"PROTEUS_LOG: expected {' | '.join(_LOG_LEVELS)}, got {level!r}", 2)
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    try:
        addresses.checked(address, insecure=options.insecure)
    except ValueError as error:
        return _fail(error, 2)
    except OSError as error:
        return _fail(error, 1)
    from proteus_fast.router import Router

    with _Signals() as signals:
        try:
            router = Router.load(checkpoint)
            server = Server(router, address, options)
            place = server.start()
        except (ValueError, OSError, RuntimeError) as error:
            return _fail(error, 1)
        _log.info("start: address=%s router=%s", place, router.versions["router"])
        sys.stdout.write(f"listening on {place}\n")
        sys.stdout.flush()
        signals.wait()
        _log.info("drain: at most %g s", options.drain_seconds)
        cut_off = server.drain(hurry=lambda: signals.count > 1)
        _log.info("stop: calls cut off=%d", cut_off)
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of a server, for every command line that starts one."""
    default = Options()
    parser.add_argument("--checkpoint", metavar="DIR", help="checkpoint to serve (default: the embedded router)")
    parser.add_argument("--address", required=True, metavar="HOST:PORT | unix:PATH", help="port 0 takes any free port")
    parser.add_argument(
        "--insecure", action="store_true", help="allow cleartext on an address other machines can reach"
    )
    parser.add_argument(
        "--max-queue",
        type=int,
        default=default.max_queue,
        metavar="N",
        help="most calls that wait (%(default)s)",
    )
    parser.add_argument(
        "--max-batch-size",
        type=int,
        default=default.max_batch_size,
        metavar="N",
        help="most rows at once (%(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, default=default.workers, metavar="N", help="calls worked on at once (%(default)s)"
    )
    parser.add_argument(
        "--drain-seconds", type=float, default=default.drain_seconds, metavar="S",
        help="how long calls in flight may take after SIGTERM (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--log-level", choices=_LOG_LEVELS, help="default: $PROTEUS_LOG, else info")


def serve_from(arguments: argparse.Namespace) -> int:
    """`serve` with what `add_arguments` has parsed."""
    try:
        options = Options(
            insecure=arguments.insecure,
            max_queue=arguments.max_queue,
            max_batch_size=arguments.max_batch_size,
            workers=arguments.workers,
            drain_seconds=arguments.drain_seconds,
        )
    except ValueError as error:
        return _fail(error, 2)
    return serve(arguments.checkpoint, arguments.address, options, log_level=arguments.log_level)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m proteus_server`."""
    parser = argparse.ArgumentParser(prog="python -m proteus_server", description="Serve a router over gRPC.")
    add_arguments(parser)
    return serve_from(parser.parse_args(argv))


def _fail(error: object, status: int) -> int:
    sys.stderr.write(f"proteus serve: {error}\n")
    return status
