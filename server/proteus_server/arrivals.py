"""Calls whose request does not come, on grpcio's servers: each holds a thread, so none may hold it for ever."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from proteus_server import errors

# as on the native plane
_ARRIVE_S = 30.0
_PRESSED_S = 1.0
_PERIOD_S = 0.25


class Arrivals(grpc.ServerInterceptor):  # type: ignore[misc]
    """Cancel a call whose next message is not there after 30 s; after one, while `most` calls or more wait for theirs.

    grpcio gives a handler its call once the request is there, and nobody the call before. So every handler is made one
    that reads a stream, of which it takes one message: on the wire the two are the same.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        # in the order of their time
        self._waiting: dict[grpc.ServicerContext, float] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._watch = threading.Thread(target=self._cancel_late, name="proteus-arrivals", daemon=True)

    def start(self) -> None:
        self._watch.start()

    def stop(self) -> None:
        self._stopping.set()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        answer: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream

        # with what grpcio looks up on a handler: its pool, and whether it blocks
        @functools.wraps(answer)
        def timed(messages: Iterator[Any], context: grpc.ServicerContext, *rest: Any) -> Any:
            arriving = self._timed(messages, context)
            if handler.request_streaming:
                return answer(arriving, context, *rest)
            for request in arriving:
                return answer(request, context, *rest)
            context.abort_with_status(errors.to_grpc(errors.invalid([("request", "expected a message, got none")])))
            raise AssertionError  # abort has raised

        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return make(timed, handler.request_deserializer, handler.response_serializer)

    def _timed(self, messages: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        while True:
            with self._lock:
                self._waiting[context] = time.monotonic()
            try:
                message = next(messages)
            except StopIteration:
                return
            finally:
                with self._lock:
                    del self._waiting[context]
            yield message

    def _cancel_late(self) -> None:
        while not self._stopping.wait(_PERIOD_S):
            now = time.monotonic()
            with self._lock:
                patience_s = _PRESSED_S if len(self._waiting) >= self._most else _ARRIVE_S
                late = [context for context, since in self._waiting.items() if now - since > patience_s]
            for context in late:
                context.cancel()
