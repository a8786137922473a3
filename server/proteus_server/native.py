"""The native data plane: the core's listener answers Route, RouteBatch and health, threads of Python what is left."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from google.rpc import code_pb2
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection, reflection_pb2

from proteus_fast import _core
from proteus_server import address as addresses
from proteus_server import errors, service

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proteus_fast._core import ForwardedCall
    from proteus_fast.certificate import Guarantee, Mode
    from proteus_fast.router import Router
    from proteus_server.control import Generation

_REFLECT = f"/{reflection.SERVICE_NAME}/ServerReflectionInfo"
_BACKLOG = 1024
_TAKE_S = 0.5
_JOIN_S = 0.5
_POLL_S = 0.02
_NO_DEADLINE_S = 1e9
_STATS = {
    "rejected": "shed",
    "expired": "expired",
    "connections": "connections",
    "accepted": "accepted",
    "refused_connections": "refused_connections",
}
_MODES: tuple[Mode, ...] = ("dual", "policy")
_GUARANTEES: tuple[Guarantee, ...] = ("certified", "calibrated")
# a host may resolve to an address of a family that this machine has not
_NOT_HERE = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}


def is_built() -> bool:
    """Whether this build of the core has the listener."""
    return hasattr(_core, "Listener")


def decided_here(router: Router) -> tuple[bool, bool]:
    """Whether the listener decides texts, and embeddings, itself: what it does not goes to Python."""
    return router.checkpoint.config.encoder == "hash", True


def served(generation: Generation) -> _core.Served:
    """A generation as the listener takes it: at its start, and to swap."""
    router = generation.router
    decides_text, decides_embedding = decided_here(router)
    return _core.Served(
        generation.snapshot,
        names=generation.names,
        tau_max=[[router.certificate.tau_max(mode, guarantee) for guarantee in _GUARANTEES] for mode in _MODES],
        versions=generation.versions.SerializeToString(),
        decides_text=decides_text,
        decides_embedding=decides_embedding,
    )


class NativePlane:
    """Sockets, the listener on them, and threads for what it forwards."""

    def __init__(
        self,
        generation: Generation,
        router_service: service.RouterService,
        *,
        workers: int,
        limit: int,
        threads: int,
        max_connection_age_s: float = 0.0,
    ) -> None:
        """Prepare a data plane; nothing is bound yet.

        Args:
            workers: threads for forwarded calls. limit: most forwarded calls that wait or are at work; also most
                calls of one read. threads: of the listener. max_connection_age_s: after which a client is told to
                connect again, and its calls have ten seconds to end; 0: never.
        """
        self._served = served(generation)
        self._service = router_service
        self._limit = limit
        self._threads = threads
        self._max_connection_age_s = max_connection_age_s
        self._reflection = reflection.ReflectionServicer(
            (service.SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        )
        self._sockets: list[socket.socket] = []
        self._listener: _core.Listener | None = None
        self._health: dict[str, int] = {}
        self._stopping = threading.Event()
        self._workers = [
            threading.Thread(target=self._work, name=f"proteus-route_{index}", daemon=True) for index in range(workers)
        ]

    def add_port(self, target: str) -> int:
        """Bind what `addresses.bound` asks for, and listen. Returns the port, 1 for a Unix socket.

        Raises:
            RuntimeError: the address cannot be bound.
        """
        try:
            self._sockets = _listen(addresses.parse(target))
        except OSError as error:
            raise RuntimeError("address: the bind failed") from error
        return 1 if target.startswith("unix:") else int(self._sockets[0].getsockname()[1])

    def start(self) -> None:
        """Serve what is bound."""
        paths = [f"/{service.SERVICE_NAME}/{name}" for name in service.METHODS]
        self._listener = _core.Listener(
            [listening.fileno() for listening in self._sockets],
            self._served,
            calls=paths,
            streams=[_REFLECT],
            threads=self._threads,
            max_calls=self._limit,
            max_rows=service.MAX_BATCH_ROWS,
            max_forwarded=self._limit,
            age_s=self._max_connection_age_s,
        )
        self._close_sockets()
        for name, status in self._health.items():
            self._listener.set_health(name, status)
        for worker in self._workers:
            worker.start()

    def set_health(self, names: Sequence[str], status: int) -> None:
        """Tell health checks and watchers the status of these services."""
        for name in names:
            self._health[name] = status
            if self._listener is not None:
                self._listener.set_health(name, status)

    def prepare(self, generation: Generation) -> Callable[[], None]:
        """What makes the listener decide by another generation from the next read on."""
        made = served(generation)

        def swap() -> None:
            self._served = made
            if self._listener is not None:
                self._listener.swap(made)

        return swap

    @property
    def pending(self) -> int:
        """Calls that are at work or wait for Python."""
        return 0 if self._listener is None else self._listener.stats()["waiting"]

    def calls(self) -> dict[tuple[str, str], int]:
        """RouterService's calls answered since the start, by method and status."""
        prefix = f"/{service.SERVICE_NAME}/"
        return {
            (path.removeprefix(prefix), code_pb2.Code.Name(code)): count
            for path, counts in ({} if self._listener is None else self._listener.calls()).items()
            if path.startswith(prefix)
            for code, count in enumerate(counts)
            if count
        }

    def counts(self) -> dict[str, int]:
        """Calls without a place (shed), late ones (expired), connections: open, accepted and refused ones."""
        stats = dict.fromkeys(_STATS, 0) if self._listener is None else self._listener.stats()
        return {name: stats[of] for of, name in _STATS.items()}

    def times(self) -> dict[str, NDArray[np.uint64]] | None:
        """Histograms as the batcher has them, of what the listener decides itself."""
        return None if self._listener is None else self._listener.times()

    def refuse_new(self) -> None:
        """Answer new calls of RouterService with UNAVAILABLE."""
        if self._listener is not None:
            self._listener.refuse_new()

    def drain(self, end: float, hurry: Callable[[], bool]) -> int:
        """Let calls end until a time of time.monotonic(), or until they are hurried.

        What comes while some are at work is refused. Then no connection is accepted any more, those that are there are
        told to go, and the calls whose request or reply is on its way end.

        Returns:
            How many calls were cut off, then or when they were hurried.
        """
        self._close_sockets()
        listener = self._listener
        if listener is None:
            return 0
        while self.pending and time.monotonic() < end and not hurry():
            time.sleep(_POLL_S)
        draining = threading.Thread(
            target=listener.drain, args=(max(0.0, end - time.monotonic()),), name="proteus-drain", daemon=True
        )
        draining.start()
        while draining.is_alive():
            if hurry():
                listener.drain(0.0)
            draining.join(_POLL_S)
        return listener.stats()["cut_off"]

    def stop(self, seconds: float) -> None:
        """Wait for the workers that long, and a moment more."""
        self._stopping.set()
        # a thread that waits in the core must not live on when the interpreter ends
        for worker in self._workers:
            if worker.is_alive():
                worker.join(max(_JOIN_S, seconds))

    def _close_sockets(self) -> None:
        while self._sockets:
            self._sockets.pop().close()

    def _work(self) -> None:
        assert self._listener is not None
        while not self._stopping.is_set():
            call = self._listener.take(_TAKE_S)
            if call is not None:
                self._answer(call)

    def _answer(self, call: ForwardedCall) -> None:
        if call.method == _REFLECT:
            result = self._reflect(call.message)
        else:
            result = self._service.answer(call.method.rpartition("/")[2], call.message, _Context(call))
        if isinstance(result, bytes):
            call.reply(result)
        else:
            call.refuse(result.code, result.text, errors.to_status(result).SerializeToString())

    def _reflect(self, message: bytes) -> bytes | errors.Refusal:
        """One message of the reflection stream; an answer depends on no other one."""
        try:
            request = reflection_pb2.ServerReflectionRequest.FromString(message)
            (reply,) = self._reflection.ServerReflectionInfo(iter([request]), None)
            answer: bytes = reply.SerializeToString()
        except Exception as error:
            return errors.refusal_of(error, "ServerReflectionInfo", draining=False)
        return answer


class _Context:
    """What RouterService asks of a call's context."""

    def __init__(self, call: ForwardedCall) -> None:
        self._call = call

    def time_remaining(self) -> float:
        remaining_s = self._call.remaining_s
        return _NO_DEADLINE_S if remaining_s is None else remaining_s

    def is_active(self) -> bool:
        return self._call.is_active()


def _listen(address: addresses.Address) -> list[socket.socket]:
    """Listening sockets: one, or one for each address of the host, on one port.

    Raises:
        OSError: none can be bound, or one is in use.
    """
    with contextlib.ExitStack() as stack:
        sockets: list[socket.socket] = []
        if address.path is not None:
            sockets.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
            sockets[0].bind(address.path)
            sockets[0].listen(_BACKLOG)
            stack.pop_all()
            return sockets
        port = address.port
        found = dict.fromkeys(
            (info[0], info[4])
            for info in socket.getaddrinfo(address.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        )
        reason = OSError(errno.EADDRNOTAVAIL, "no address")
        for family, place in found:
            try:
                listening = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listening.bind((place[0], port, *place[2:]))
                listening.listen(_BACKLOG)
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                reason = error
                continue
            port = port or int(listening.getsockname()[1])
            sockets.append(listening)
        if not sockets:
            raise reason
        stack.pop_all()
        return sockets
