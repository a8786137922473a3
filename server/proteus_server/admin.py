"""AdminService: an operator's changes, by grpcio on a listener of its own that only this machine reaches.

Reload takes a path only inside `--checkpoint-root`, links followed; without a root only an empty one, which reads again
what the server was started with. A checkpoint's transformer has to lie where the checkpoint says; `--encoder` holds
for the one that the server was started with.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent import futures
from typing import TYPE_CHECKING, Any

import grpc
from grpc_reflection.v1alpha import reflection

from proteus_fast.certificate import Status
from proteus_server import address as addresses
from proteus_server import arrivals, errors
from proteus_server import proteus_pb2 as pb

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from proteus_server.control import Control, Generation

SERVICE_NAME = "proteus.v1.AdminService"
_MAX_CALLS = 32
_TAUS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)


class AdminService:
    """The handlers. What they refuse has the text of the check that refused it: an operator's calls hold no prompt."""

    def __init__(self, control: Control, data_plane: str) -> None:
        self.draining = False
        self._control = control
        self._data_plane = data_plane
        self._started = time.monotonic()
        self._calls: dict[str, tuple[type[Message], Callable[[Any], Message]]] = {
            "Reload": (pb.ReloadRequest, self._reload),
            "SetPrices": (pb.SetPricesRequest, self._set_prices),
            "SetAvailability": (pb.SetAvailabilityRequest, self._set_availability),
            "GetPolicy": (pb.GetPolicyRequest, self._get_policy),
        }

    def method_handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """One handler for each method."""
        return {name: self._handler(name) for name in self._calls}

    def _handler(self, method: str) -> grpc.RpcMethodHandler:
        kind, handle = self._calls[method]

        def handler(data: bytes, context: grpc.ServicerContext) -> bytes:
            try:
                if self.draining:
                    raise errors.unavailable()
                reply: bytes = handle(errors.parse(kind, data)).SerializeToString()
                return reply
            except Exception as error:
                refusal = errors.refusal_of(error, method, draining=self.draining)
            context.abort_with_status(errors.to_grpc(refusal))
            raise AssertionError  # abort has raised

        return grpc.unary_unary_rpc_method_handler(handler)

    def _reload(self, request: pb.ReloadRequest) -> Message:
        try:
            return _reply(self._control.reload(request.path))
        except PermissionError as error:
            # the system's own is of a file, not of the request
            if error.errno is None:
                raise errors.invalid([_field(error)]) from None
            raise errors.precondition("CHECKPOINT", errors.shortened(str(error))) from None
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            raise errors.precondition("CHECKPOINT", errors.shortened(str(error))) from None

    def _set_prices(self, request: pb.SetPricesRequest) -> Message:
        with _invalid("price_usd_per_query"):
            return _reply(self._control.set_prices(dict(request.price_usd_per_query)))

    def _set_availability(self, request: pb.SetAvailabilityRequest) -> Message:
        with _invalid("available"):
            return _reply(self._control.set_availability(dict(request.available)))

    def _get_policy(self, _request: pb.GetPolicyRequest) -> Message:
        served = self._control.generation
        router = served.router
        prices = zip(
            served.names, served.price_usd.tolist(), router.pool.price_usd.tolist(), served.bit.values(), strict=True
        )
        return pb.GetPolicyReply(
            versions=served.versions,
            certified=served.certified,
            candidates=[
                pb.ServedCandidate(
                    name=name,
                    price_usd_per_query=price,
                    certified_price_usd_per_query=own,
                    available=bool(served.available & bit),
                )
                for name, price, own, bit in prices
            ],
            default_mode=pb.MODE_POLICY if router.mode == "policy" else pb.MODE_DUAL,
            tau_max=router.tau_max,
            targets=[
                _target(served, tau) for tau in sorted({*_TAUS, *([] if router.tau_max is None else [router.tau_max])})
            ],
            data_plane=self._data_plane,
            uptime_s=time.monotonic() - self._started,
        )


class AdminServer:
    """AdminService on its address."""

    def __init__(self, control: Control, address: str, data_plane: str) -> None:
        """Prepare a server; nothing is bound yet.

        Raises:
            ValueError: the address is none, or other machines reach it: no flag allows that.
            OSError: the address's host does not resolve.
        """
        self._address = checked(address)
        self._service = AdminService(control, data_plane)
        # one for each call: those that wait, for their request or for another change, keep nobody waiting
        self._threads = futures.ThreadPoolExecutor(_MAX_CALLS, "proteus-admin")
        self._arrivals = arrivals.Arrivals(_MAX_CALLS // 2)
        # who may call is asked here, by an interceptor, should a loopback address ever not be enough
        self._server = grpc.server(
            self._threads,
            interceptors=(self._arrivals,),
            options=(("grpc.so_reuseport", 0),),
            maximum_concurrent_rpcs=_MAX_CALLS,
        )
        self._server.add_registered_method_handlers(SERVICE_NAME, self._service.method_handlers())
        reflection.enable_server_reflection((SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self._exit = contextlib.ExitStack()

    def start(self) -> str:
        """Bind and serve. Returns the address with its real port.

        Raises:
            OSError: the address cannot be bound.
        """
        place = self._exit.enter_context(addresses.bound(self._address, self._server.add_insecure_port))
        self._arrivals.start()
        self._server.start()
        return place

    def refuse_new(self) -> None:
        """Answer every call with UNAVAILABLE."""
        self._service.draining = True

    def stop(self) -> None:
        """End at once what is still open; a change that has begun to be made is made."""
        self._server.stop(0).wait()
        self._arrivals.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._exit.close()


def checked(address: str) -> addresses.Address:
    """Read the address of an AdminServer; see there."""
    return addresses.checked(address, insecure=False, argument="admin_address")


def _reply(served: Generation) -> Message:
    return pb.ChangeReply(versions=served.versions, certified=served.certified)


def _target(served: Generation, tau: float) -> Message:
    if not served.certified:
        return pb.Target(tau=tau, status=int(Status.UNCERTIFIED))  # type: ignore[arg-type]
    found = served.router.feasibility(tau)
    return pb.Target(
        tau=tau,
        status=int(found.status),  # type: ignore[arg-type]
        certified_floor=found.certified_floor,
        expected_cost_usd=found.expected_cost_usd,
    )


@contextlib.contextmanager
def _invalid(field: str) -> Any:
    try:
        yield
    except ValueError as error:
        raise errors.invalid([(field, str(error))]) from None


def _field(error: PermissionError) -> tuple[str, str]:
    field, _, text = str(error).partition(": ")
    return field, text
