"""The server's life: load, bind, serve, drain."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from grpc_health.v1 import health, health_pb2

from proteus_fast import __version__
from proteus_fast._core import QueueFullError
from proteus_server import address as addresses
from proteus_server import admin, control, errors, grpcio_plane, logs, metrics, native, service
from proteus_server.config import DATA_PLANES, Options, add_arguments, options_of, settings_from

if TYPE_CHECKING:
    from typing_extensions import Self

    from proteus_fast.router import Router

__all__ = ["DATA_PLANES", "Options", "Server", "add_arguments", "main", "serve", "serve_from"]

_log = logging.getLogger("proteus_server")
_HEALTH_NAMES = (health.OVERALL_HEALTH, service.SERVICE_NAME)
_HEALTH_PERIOD_S = 10.0
_POLL_S = 0.02
# of connections, at most: a table of the listener has a place for each
_MAX_DESCRIPTORS = 65_536
# calls that were on the wire when the drain began are still taken
_ON_THE_WIRE_S = 0.1


class Server:
    """One router behind one address. `start`, then `drain`; `running` does both."""

    def __init__(
        self,
        router: Router,
        address: str,
        options: Options | None = None,
        *,
        checkpoint: str | None = None,
        encoder: str | None = None,
        device: str = "cpu",
    ) -> None:
        """Prepare a server; nothing is bound yet.

        Args:
            checkpoint, encoder, device: how the router was loaded, for a Reload.

        Raises:
            ValueError: an address is none, or is reachable from other machines without `insecure`.
            OSError: an address's host does not resolve.
        """
        self._options = options = options or Options()
        self._address = addresses.checked(address, insecure=options.insecure)
        plane = options.plane
        self.control = control.Control(
            router,
            batching={"max_batch_size": options.max_batch_size, "max_queue_rows": service.MAX_BATCH_ROWS},
            checkpoint=checkpoint,
            encoder=encoder,
            device=device,
            root=options.checkpoint_root,
        )
        served = self.control.generation
        self._service = service.RouterService(
            served,
            workers=options.workers,
            queue_calls=options.max_queue,
            data_plane=plane,
            access_log=logs.AccessLog(options.access_log_sample) if options.access_log_sample > 0.0 else None,
        )
        limit = options.workers + options.max_queue
        self._plane: native.NativePlane | grpcio_plane.GrpcioPlane = (
            native.NativePlane(
                served,
                self._service,
                workers=options.workers,
                limit=limit,
                threads=options.threads,
                max_connection_age_s=options.max_connection_age,
            )
            if plane == "native"
            else grpcio_plane.GrpcioPlane(self._service, limit, options.max_connection_age)
        )
        # what a listener hands over to Python finds the new generation there
        self.control.follow(self._service.prepare)
        if isinstance(self._plane, native.NativePlane):
            self.control.follow(self._plane.prepare)
        self._admin = (
            None if options.admin_address is None else admin.AdminServer(self.control, options.admin_address, plane)
        )
        self._metrics = (
            None
            if options.metrics_address is None
            else metrics.Endpoint(self.control, self._plane, plane, options.metrics_address, insecure=options.insecure)
        )
        self.admin_address: str | None = None
        self.metrics_address: str | None = None
        self._stopping = threading.Event()
        self._health_lock = threading.Lock()
        self._set_health(ready=False)
        self._exit = contextlib.ExitStack()
        self._monitor = threading.Thread(target=self._watch_health, name="proteus-health", daemon=True)

    def start(self) -> str:
        """Bind, serve, and make one real decision before health says SERVING. Returns the address with its real port.

        `admin_address` and `metrics_address` are those of the other listeners from then on.

        Raises:
            OSError: an address cannot be bound.
            RuntimeError: the router makes no valid decision.
            ValueError, OSError, ImportError: its transformer does not load.
        """
        try:
            control.check(self.control.generation.router)
            place = self._exit.enter_context(addresses.bound(self._address, self._plane.add_port))
            self._plane.start()
            self._service.check()
            self.metrics_address = None if self._metrics is None else self._metrics.start()
            self.admin_address = None if self._admin is None else self._admin.start()
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
        self._set_health(ready=False)
        time.sleep(max(0.0, min(_ON_THE_WIRE_S, end - time.monotonic())))
        self._service.draining = True
        if self._admin is not None:
            self._admin.refuse_new()
        self._plane.refuse_new()
        time.sleep(max(0.0, min(_POLL_S, end - time.monotonic())))
        cut_off = self._plane.drain(end, hurry)
        self.control.generation.batcher.close(drain=not cut_off)
        self._plane.stop(max(0.0, end - time.monotonic()))
        self._exit.close()
        for listener in (self._admin, self._metrics):
            if listener is not None:
                listener.stop()
        return cut_off

    @property
    def pending(self) -> int:
        """Calls that are at work or wait."""
        return self._plane.pending

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
        with self._health_lock:
            # once it stops a server is never ready again
            if not (ready and self._stopping.is_set()):
                self._plane.set_health(_HEALTH_NAMES, status)

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
                logs.event(_log, logging.INFO, "health", ready=True)
            else:
                logs.event(_log, logging.ERROR, "health", ready=False, reason=reason)

    def _why_not_ready(self) -> str | None:
        try:
            self._service.check()
        except QueueFullError:
            # overloaded, which is not unhealthy
            return None
        except Exception as error:
            return errors.describe(error)
        return None


class _Signals:
    """Count SIGTERM and SIGINT inside a `with` block of the main thread."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Self:
        # a signal that the kernel gives to another thread interrupts no lock that this one waits for; bytes do
        self._arrived, self._written = os.pipe()
        os.set_blocking(self._written, False)
        self._before = {number: signal.signal(number, self._arrive) for number in (signal.SIGTERM, signal.SIGINT)}
        self._written_before = signal.set_wakeup_fd(self._written, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._written_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._arrived)
        os.close(self._written)

    def wait(self) -> None:
        # a byte is the number of its signal; there may be handlers for others
        while os.read(self._arrived, 1)[0] not in self._before:
            pass

    def _arrive(self, _number: int, _frame: object) -> None:
        self.count += 1


def serve(
    checkpoint: str | None,
    address: str,
    options: Options | None = None,
    *,
    encoder: str | None = None,
    device: str = "cpu",
    log_level: str | None = None,
    log_format: str = "text",
) -> int:
    """Serve until SIGTERM or SIGINT; a second signal ends the drain. Prints `listening on ADDRESS` when ready.

    Args:
        checkpoint: a checkpoint's folder; None: the embedded router.
        address: HOST:PORT (port 0: any free one) or unix:PATH.
        encoder: where the transformer of the checkpoint is, if not where it was. device: where it encodes texts, cpu,
            cuda or cuda:N; embeddings are decided on the CPU.
        log_level: debug | info | warning | error; None: $PROTEUS_LOG, else info. log_format: text | json.

    Returns:
        The exit status: 0 after a drain, 1 where the checkpoint does not load or an address is not to be had, 2 for
        wrong usage.
    """
    options = options or Options()
    level = log_level or os.environ.get("PROTEUS_LOG") or "info"
    if level not in logs.LEVELS:
        return _fail(f"PROTEUS_LOG: expected {' | '.join(logs.LEVELS)}, got {level!r}", 2)
    logs.configure(level, log_format)
    try:
        addresses.checked(address, insecure=options.insecure)
        if options.admin_address is not None:
            admin.checked(options.admin_address)
        if options.metrics_address is not None:
            metrics.checked(options.metrics_address, insecure=options.insecure)
    except ValueError as error:
        return _fail(error, 2)
    except OSError as error:
        return _fail(error, 1)
    from proteus_fast.router import Router

    _raise_descriptors()
    with _Signals() as signals:
        logs.event(_log, logging.INFO, "start", version=__version__, checkpoint=checkpoint or "embedded")
        try:
            router = Router.load(checkpoint, device, encoder=encoder)
            server = Server(router, address, options, checkpoint=checkpoint, encoder=encoder, device=device)
            place = server.start()
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            return _fail(error, 1)
        try:
            _announce(server, place)
            signals.wait()
        finally:
            logs.event(_log, logging.INFO, "drain", seconds=options.drain_seconds)
            cut_off = server.drain(hurry=lambda: signals.count > 1)
            logs.event(_log, logging.INFO, "stop", cut_off=cut_off)
    return 0


def _announce(server: Server, place: str) -> None:
    others = {"admin": server.admin_address, "metrics": server.metrics_address}
    logs.event(
        _log,
        logging.INFO,
        "ready",
        address=place,
        **{name: other for name, other in others.items() if other is not None},
        **logs.versions(server.control.generation.versions),
    )
    if sys.stdout is None:
        return
    try:
        sys.stdout.write(f"listening on {place}\n")
        sys.stdout.flush()
    except OSError:
        # whoever started the server does not read it, which is no reason not to serve; nor to fail at the exit's flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def serve_from(arguments: argparse.Namespace) -> int:
    """`serve` with what `add_arguments` has parsed."""
    from proteus_fast.checkpoint import default_place

    try:
        settings: dict[str, Any] = settings_from(arguments)
        options = options_of(settings)
    except (ValueError, OSError) as error:
        return _fail(error, 2)
    others = {name: settings[name] for name in ("encoder", "device", "log_level", "log_format") if name in settings}
    checkpoint = settings["checkpoint"] if "checkpoint" in settings else default_place()
    return serve(checkpoint, settings["address"], options, **others)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m proteus_server`."""
    parser = argparse.ArgumentParser(prog="python -m proteus_server", description="Serve a router over gRPC.")
    add_arguments(parser)
    return serve_from(parser.parse_args(argv))


def _raise_descriptors() -> None:
    """Let this process open as many files as it may, which is often far more than it is given at first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _fail(error: object, status: int) -> int:
    sys.stderr.write(f"proteus serve: {error}\n")
    return status
