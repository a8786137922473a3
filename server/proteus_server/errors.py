"""One table, both ways: what went wrong -> the gRPC status that a client sees -> the exception that the client raises.

Only texts written here or in service.py reach a client. The text of an exception never does, nor does it reach the
log: it can hold a prompt.
"""

from __future__ import annotations

import logging
import secrets
import traceback
from collections.abc import Mapping, Sequence
from typing import TypeVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from proteus_fast._core import QueueFullError

DOMAIN = "proteus.v1"
RETRY_AFTER_S = 0.1
# an error travels twice in the trailing metadata, of which many peers take 8 KiB at most
_MOST_VIOLATIONS = 16
_MOST_TEXT = 512

_EXCEPTIONS: dict[grpc.StatusCode, type[Exception]] = {
    grpc.StatusCode.INVALID_ARGUMENT: ValueError,
    grpc.StatusCode.FAILED_PRECONDITION: ValueError,
    grpc.StatusCode.DEADLINE_EXCEEDED: TimeoutError,
    grpc.StatusCode.UNAVAILABLE: ConnectionError,
    grpc.StatusCode.UNIMPLEMENTED: NotImplementedError,
}

_log = logging.getLogger("proteus_server")
_Request = TypeVar("_Request", bound=Message)


class Refusal(Exception):
    """A call that the server refuses, with the status and the details that its client gets."""

    def __init__(self, code: int, text: str, *details: Message) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.details = details


def invalid(violations: Sequence[tuple[str, str]]) -> Refusal:
    """INVALID_ARGUMENT that names each field and says what was expected of it.

    Args:
        violations: pairs (field, "expected X, got Y"); the text holds sizes and numbers, never what a text field held.
    """
    shown = violations[:_MOST_VIOLATIONS]
    bad_request = error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(field=field, description=text) for field, text in shown
        ]
    )
    text = "; ".join(f"{field}: {text}" for field, text in shown)
    if len(violations) > len(shown):
        text += f"; and {len(violations) - len(shown)} more"
    return Refusal(code_pb2.INVALID_ARGUMENT, text, bad_request)


def precondition(reason: str, text: str, metadata: Mapping[str, str] | None = None) -> Refusal:
    """FAILED_PRECONDITION: the request is well formed, but what is loaded cannot meet it."""
    return Refusal(code_pb2.FAILED_PRECONDITION, text, _error_info(reason, metadata or {}))


def overloaded() -> Refusal:
    """RESOURCE_EXHAUSTED: the queue is full; a later try may succeed."""
    return Refusal(code_pb2.RESOURCE_EXHAUSTED, "queue: expected a free place, got a full queue", _retry_info())


def unavailable() -> Refusal:
    """UNAVAILABLE: this server is going away; another one may answer."""
    return Refusal(code_pb2.UNAVAILABLE, "server: draining, no new calls", _retry_info())


def deadline_exceeded() -> Refusal:
    """DEADLINE_EXCEEDED: the call's time was over before anything was computed."""
    return Refusal(code_pb2.DEADLINE_EXCEEDED, "deadline: passed before the decision was made")


def unimplemented() -> Refusal:
    """UNIMPLEMENTED: the method is in the contract, but not in this version."""
    return Refusal(code_pb2.UNIMPLEMENTED, "method: not in this version")


def refusal_of(error: Exception, method: str, *, draining: bool) -> Refusal:
    """The refusal that an exception of a handler stands for.

    Checks of the request raise a Refusal themselves; another ValueError or TypeError is a mistake in here: INTERNAL.
    """
    if isinstance(error, Refusal):
        return error
    if isinstance(error, QueueFullError):
        return overloaded()
    if isinstance(error, TimeoutError):
        return deadline_exceeded()
    if draining and isinstance(error, RuntimeError):
        return unavailable()
    reference = secrets.token_hex(8)
    described = describe(error)
    _log.error(
        "internal error: reference=%s method=%s %s",
        reference,
        method,
        described,
        extra={"event": "internal error", "fields": {"reference": reference, "method": method, "error": described}},
    )
    return Refusal(
        code_pb2.INTERNAL, f"internal error, reference {reference}", _error_info("INTERNAL", {"reference": reference})
    )


def parse(kind: type[_Request], data: bytes) -> _Request:
    """Read a request.

    Raises:
        Refusal: the bytes are no such message.
    """
    try:
        request: _Request = kind.FromString(data)
        return request
    except DecodeError:
        raise invalid(
            [("request", f"expected a {kind.DESCRIPTOR.full_name}, got {len(data)} bytes that are none")]
        ) from None


def exception_of(error: grpc.RpcError) -> Exception:
    """The built-in exception (or QueueFullError) that a failed call stands for in the client."""
    code, text = error.code(), error.details() or ""
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        # grpcio itself refuses what is larger than the limit, with no details
        return ValueError(f"request: {text}") if "larger than max" in text else QueueFullError(text)
    kind = _EXCEPTIONS.get(code)
    return RuntimeError(f"{code.name}: {text}") if kind is None else kind(text)


def shortened(text: str) -> str:
    """The text, cut off where it is too long for an error or a line of the log."""
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}... ({len(text)} characters)"


def describe(error: BaseException) -> str:
    """An exception's types and frames in one line, without its text and without any value."""
    parts: list[str] = []
    link: BaseException | None = error
    while link is not None and len(parts) < 4:
        frames = traceback.extract_tb(link.__traceback__)
        where = " > ".join(f"{frame.filename}:{frame.lineno}:{frame.name}" for frame in frames)
        parts.append(f"type={type(link).__qualname__} frames=[{where}]")
        link = link.__cause__ or link.__context__
    return " from ".join(parts)


def to_grpc(refusal: Refusal) -> grpc.Status:
    """The refusal as grpcio's abort_with_status takes it: google.rpc.Status in the trailing metadata."""
    return rpc_status.to_status(to_status(refusal))


def to_status(refusal: Refusal) -> status_pb2.Status:
    """The refusal as google.rpc.Status."""
    status = status_pb2.Status(code=refusal.code, message=refusal.text)
    for detail in refusal.details:
        packed = any_pb2.Any()
        # maps in one order, the core's
        packed.Pack(detail, deterministic=True)
        status.details.append(packed)
    return status


def _error_info(reason: str, metadata: Mapping[str, str]) -> Message:
    return error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=dict(metadata))


def _retry_info() -> Message:
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(int(RETRY_AFTER_S * 1e9))
    return error_details_pb2.RetryInfo(retry_delay=delay)
