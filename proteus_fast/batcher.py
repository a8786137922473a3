"""Calls of many threads and tasks, decided together in batches of what is there."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary, finalize

import numpy as np
from numpy.typing import NDArray

from proteus_fast import _core
from proteus_fast.answers import Decision, RouteBatch
from proteus_fast.arrays import by_the_caller_s_name, from_numpy, to_float32, to_numpy, to_tau
from proteus_fast.certificate import Guarantee, Mode
from proteus_fast.encoder import LazyEncoder
from proteus_fast.router import Router, check_query

if TYPE_CHECKING:
    from typing_extensions import Self

ALL_CANDIDATES = (1 << 64) - 1
# a CPU encodes a batch text by text: a long one would only hold up the answers to its first texts
CPU_TOKEN_BUDGET = 1024
# what the core takes for no deadline
_NO_DEADLINE_S = 3e7


def backend_options(router: Router, device: str = "cpu") -> dict[str, Any]:
    """What ``_core.Batcher`` needs beside ``router.snapshot`` to answer as this router does.

    A router without a transformer needs nothing: the core encodes and decides, and no lane ever takes the GIL. A
    transformer encodes for the core. On a CUDA ``device`` texts and rows are encoded and decided there.

    Raises:
        ValueError, ImportError: no such device, no torch or Triton; a transformer in bfloat16 in front of the core,
            which would answer as if its texts were certified.
    """
    source = router.checkpoint.config.source
    options: dict[str, Any] = {"max_text_tokens": 0 if source is None else source.max_tokens}
    if device != "cpu":
        from proteus_fast import cuda

        place = cuda.find_device(device)
        from proteus_kernels.token_batches import TOKEN_BUDGET

        route = cuda.batch_route(router, router.on_device(place))
        return {**options, "route": route, "token_budget": 0 if source is None else TOKEN_BUDGET, "lanes": 2}
    if source is None:
        return {}
    if not router.texts_certified:
        raise ValueError("device: expected cuda for a transformer in bfloat16, whose texts nothing certifies, got cpu")
    encoder = router._encoder
    on_cpu = not isinstance(encoder, LazyEncoder) or encoder._device == "cpu"

    def encode(texts: list[str]) -> NDArray[np.float32]:
        return to_float32(to_numpy(router.encode(texts), "encode", from_gpu=True), "encode")

    if on_cpu:
        return {**options, "encode": encode, "token_budget": CPU_TOKEN_BUDGET, "lanes": 1}
    from proteus_kernels.token_batches import TOKEN_BUDGET

    return {**options, "encode": encode, "token_budget": TOKEN_BUDGET, "lanes": 2}


class _OwnEncoder:
    """A caller's function as the core's encoder. It lets go of the function when told to: what the core refers to no
    collector sees, and the function may be a method of whoever has the batcher."""

    def __init__(self, encode: Callable[[list[str]], Any]) -> None:
        self._encode: Callable[[list[str]], Any] | None = encode

    def __call__(self, texts: list[str]) -> NDArray[np.float32]:
        if self._encode is None:
            raise RuntimeError("batcher: closed")
        return to_float32(to_numpy(self._encode(texts), "encode", from_gpu=True), "encode")

    def release(self) -> None:
        self._encode = None


def _check_own_encoder(router: Router, device: str, encode: Callable[[list[str]], Any]) -> None:
    if not callable(encode):
        raise TypeError(f"encode: expected a function, got {type(encode).__name__}")
    if router.checkpoint.config.encoder != "none":
        raise ValueError("encode: expected none for a router that encodes texts itself, got one")
    if device != "cpu":
        raise ValueError(f"device: expected cpu with an encode of your own, got {device}")


class _Call(NamedTuple):
    """Arguments of one call, checked. `like` is the caller's array, None where texts came; `name`: of its rows."""

    texts: Sequence[str] | None
    x: NDArray[np.float32] | None
    tau: float | NDArray[np.float64]
    options: dict[str, Any]
    strict: bool
    like: Any
    name: str


def _seconds(deadline_s: Any) -> float | None:
    """A deadline as a float, whatever kind of number it is: an event loop's timer takes no other."""
    if deadline_s is None:
        return None
    try:
        return float(deadline_s)
    except (TypeError, ValueError):
        raise TypeError(f"deadline_s: expected a number, got {type(deadline_s).__name__}") from None


def _is_empty(call: _Call) -> bool:
    return not len(call.x if call.texts is None else call.texts)  # type: ignore[arg-type]


class _Port:
    """Calls of one event loop: the loop watches one descriptor, and one drain a wake-up serves all that have ended."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.completions = _core.Completions()
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._tags = count()
        loop.add_reader(self.completions.fileno(), self.drain)

    def drain(self) -> None:
        """Wake the tasks whose calls have an outcome."""
        for tag in self.completions.drain():
            future = self._waiting.pop(tag, None)
            if future is not None and not future.done():
                future.set_result(None)

    def detach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Drain for the last time; on the loop's thread."""
        self.drain()
        loop.remove_reader(self.completions.fileno())

    async def result(self, submit: Callable[..., _core.Ticket], deadline_s: float | None) -> _core.BatchResult:
        """Submit a call and wait for its outcome, at most until its deadline."""
        loop = asyncio.get_running_loop()
        tag = next(self._tags)
        ticket = submit(completions=self.completions, tag=tag, deadline_s=deadline_s)
        future = self._waiting[tag] = loop.create_future()
        timer = None
        if deadline_s is not None and deadline_s < _NO_DEADLINE_S:
            timer = loop.call_later(deadline_s, self._expire, future)
        try:
            await future
        except BaseException:
            # cancelled, or late: what is still queued is dropped
            ticket.abandon()
            raise
        finally:
            self._waiting.pop(tag, None)
            if timer is not None:
                timer.cancel()
        return ticket.result()

    def _expire(self, future: asyncio.Future[None]) -> None:
        # an answer that is there counts, though the loop has not come to it
        self.drain()
        if not future.done():
            future.set_exception(TimeoutError("deadline_s: expected an answer in time, got none"))


_Ports = WeakKeyDictionary[asyncio.AbstractEventLoop, _Port]


def _detach_all(ports: _Ports) -> None:
    for loop, port in list(ports.items()):
        # a loop that has ended watches nothing
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(port.detach, loop)
    ports.clear()


class Batcher:
    """A router behind a bounded queue: callers that wait at the same time are answered by one batch.

    With a transformer they share its batches; with a hash encoder the core does everything, and its threads never take
    the GIL. Answers are those of ``router.route`` and ``router.route_batch``, on a CPU to the bit. Safe to call from
    many threads and from coroutines of any event loop. Close it, or use it in a ``with`` block.
    """

    def __init__(
        self,
        router: Router,
        *,
        device: str = "cpu",
        encode: Callable[[list[str]], Any] | None = None,
        max_batch_size: int = 256,
        max_queue_rows: int = 4096,
        window_us: int = 0,
        token_budget: int | None = None,
        lanes: int | None = None,
    ) -> None:
        """Start the batcher's threads; a transformer is loaded with the first text.

        Args:
            router: what decides. device: where: ``cpu``, or a CUDA device, where texts are encoded and rows decided in
                one go; decisions from there have no fallbacks.
            encode: of a router that was trained on embeddings of your own: what makes them, from a list of B texts to
                (B, D), any floating dtype, a torch tensor on any device. One call of it for each batch, on the
                batcher's thread; what it raises is the cause of its callers' RuntimeError.
            max_batch_size: most rows of a batch; a call with more is a batch by itself.
            max_queue_rows: most rows that wait; a call beyond raises QueueFullError, one that has more ValueError.
            window_us: how long the first of a batch may wait for others, in microseconds, at most a minute, and half of
                what a deadline leaves; 0 takes what is there.
            token_budget: most tokens of a batch's texts for a transformer, counted as one for four bytes begun and at
                most the encoder's ``max_tokens`` a text; 0: no limit. None: 1,024 on a CPU, 16,384 on a GPU. A call
                with more is a batch by itself, and is given up between parts of that size once nobody waits for it.
            lanes: batches in the making at once. None: 2 with a GPU, which works on one while the next is formed,
                tokenised and launched; 1 without.

        Raises:
            TypeError, ValueError: ``argument: expected X, got Y``. ImportError: no torch or Triton for ``device``.
        """
        if not isinstance(router, Router):
            raise TypeError(f"router: expected a Router, got {type(router).__name__}")
        self._own_encoder = None
        if encode is None:
            options = backend_options(router, device)
        else:
            _check_own_encoder(router, device, encode)
            self._own_encoder = _OwnEncoder(encode)
            options = {"encode": self._own_encoder, "lanes": 1}
        self._takes_texts = encode is not None or router.checkpoint.config.encoder != "none"
        if token_budget is not None:
            options["token_budget"] = token_budget
        if lanes is not None:
            options["lanes"] = lanes
        self._core = _core.Batcher(
            router.snapshot,
            max_batch_size=max_batch_size,
            max_queue_rows=max_queue_rows,
            window_us=window_us,
            **options,
        )
        self._router = router
        self._lock = threading.Lock()
        self._closed = False
        self._ports: _Ports = WeakKeyDictionary()
        # also where nobody closes: a loop that goes on would keep a port's descriptor and watch it
        self._detach = finalize(self, _detach_all, self._ports)
        self._detach.atexit = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=kind is None)

    @property
    def router(self) -> Router:
        """The router that decides."""
        return self._router

    def route(
        self,
        text: str,
        tau: float,
        *,
        available: Iterable[str] | None = None,
        mode: Mode | None = None,
        guarantee: Guarantee = "certified",
        strict: bool = False,
        deadline_s: float | None = None,
    ) -> Decision:
        """Choose a candidate for one text; blocks without the GIL.

        Args:
            text, tau, available, mode, guarantee, strict: as in :meth:`Router.route`.
            deadline_s: seconds from now after which no answer is wanted; None: no deadline. What is still queued then
                is not computed.

        Raises:
            QueueFullError: too many rows wait. TimeoutError: the deadline passed.
            RuntimeError: closed; or the encoder failed, with its exception as the cause.
            TypeError, ValueError: ``argument: expected X, got Y``.
        """
        call = self._check_text(text, tau, available, mode, guarantee, strict)
        return self._decision(call, self._wait(call, deadline_s))

    def route_batch(
        self,
        queries: Any,
        tau: Any,
        *,
        available: Any = None,
        mode: Mode | None = None,
        guarantee: Guarantee = "certified",
        strict: bool = False,
        deadline_s: float | None = None,
    ) -> RouteBatch:
        """Choose a candidate for every text or row; blocks without the GIL.

        Args:
            queries: a list of B texts or embeddings (B, D): NumPy, torch or DLPack on the CPU, any floating dtype. None
                at all are answered at once.
            tau: accuracy target, a float in [0, 1] or (B,) floats.
            available: candidates that may be chosen, bool, (K,).
            mode, guarantee, strict: as in :meth:`Router.route_batch`. deadline_s: as in :meth:`route`.

        Returns:
            The answers, in the caller's kind of array; NumPy for texts.

        Raises:
            As :meth:`route`.
        """
        call = self._check_batch(queries, tau, available, mode, guarantee, strict)
        return self._batch_of_none(call) if _is_empty(call) else self._batch(call, self._wait(call, deadline_s))

    async def route_async(
        self,
        text: str,
        tau: float,
        *,
        available: Iterable[str] | None = None,
        mode: Mode | None = None,
        guarantee: Guarantee = "certified",
        strict: bool = False,
        deadline_s: float | None = None,
    ) -> Decision:
        """:meth:`route` for a coroutine; cancelling its task drops a call that is still queued."""
        call = self._check_text(text, tau, available, mode, guarantee, strict)
        return self._decision(call, await self._result(call, deadline_s))

    async def route_batch_async(
        self,
        queries: Any,
        tau: Any,
        *,
        available: Any = None,
        mode: Mode | None = None,
        guarantee: Guarantee = "certified",
        strict: bool = False,
        deadline_s: float | None = None,
    ) -> RouteBatch:
        """:meth:`route_batch` for a coroutine; cancelling its task drops a call that is still queued."""
        call = self._check_batch(queries, tau, available, mode, guarantee, strict)
        return self._batch_of_none(call) if _is_empty(call) else self._batch(call, await self._result(call, deadline_s))

    def close(self, drain: bool = True) -> None:
        """Refuse new calls; finish the queued ones, or fail them with RuntimeError. Waits for a batch that runs."""
        self._core.close(drain)
        if self._own_encoder is not None:
            self._own_encoder.release()
        with self._lock:
            # what the core refuses from now on gets no port that stays
            self._closed = True
        self._detach()

    def stats(self) -> dict[str, int]:
        """Counts since the start: calls submitted, completed, rejected (queue full), expired (dropped: late, or nobody
        waits) and failed, batches and rows computed; and queued_rows, which wait now. Reading takes no lock.
        """
        return self._core.stats()

    def times(self) -> dict[str, NDArray[np.uint64]]:
        """Histograms of durations since the start, read without a lock: counts in buckets a quarter octave wide.

        Returns:
            ``bound_ns``: the first nanosecond above each bucket, the last without one; ``queue`` and ``total``: calls
            by the time until their batch began and until their answer; ``encode`` and ``decide``: batches;
            ``sum_ns``: the exact sums of queue, encode, decide and total.
        """
        return self._core.times()

    def _check_text(
        self,
        text: str,
        tau: float,
        available: Iterable[str] | None,
        mode: Mode | None,
        guarantee: Guarantee,
        strict: bool,
    ) -> _Call:
        target, mask = check_query(self._router.pool, text, tau, available)
        return self._call([text], None, target, mask, mode, guarantee, strict, None, "text")

    def _check_batch(
        self, queries: Any, tau: Any, available: Any, mode: Mode | None, guarantee: Guarantee, strict: bool
    ) -> _Call:
        target = tau if type(tau) is float else to_tau(tau)
        mask = None if available is None else to_numpy(available, "available")
        if mask is not None and (mask.shape != (len(self._router.pool),) or mask.dtype != np.bool_):
            expected = f"a bool array of shape ({len(self._router.pool)},)"
            raise ValueError(f"available: expected {expected}, got {mask.dtype} of shape {mask.shape}")
        if isinstance(queries, str | bytes):
            raise TypeError(f"queries: expected a list of str or embeddings, got one {type(queries).__name__}")
        if isinstance(queries, list | tuple):
            return self._call(queries, None, target, mask, mode, guarantee, strict, None, "queries")
        x = to_float32(to_numpy(queries, "queries"), "queries")
        if x.ndim != 2 or x.shape[1] != self._router.input_dim:
            raise ValueError(f"queries: expected shape (B, {self._router.input_dim}), got {x.shape}")
        return self._call(None, x, target, mask, mode, guarantee, strict, queries, "queries")

    def _call(
        self,
        texts: Sequence[str] | None,
        x: NDArray[np.float32] | None,
        tau: float | NDArray[np.float64],
        mask: NDArray[np.bool_] | None,
        mode: Mode | None,
        guarantee: Guarantee,
        strict: bool,
        like: Any,
        name: str,
    ) -> _Call:
        if texts is not None and not self._takes_texts:
            raise ValueError(f"{name}: expected embeddings, got texts: this router has no text encoder")
        bits = ALL_CANDIDATES if mask is None else sum(1 << i for i in np.flatnonzero(mask).tolist())
        options = {"mode": mode, "guarantee": guarantee, "available": bits}
        return _Call(texts, x, tau, options, strict, like, name)

    def _port(self) -> _Port:
        loop = asyncio.get_running_loop()
        with self._lock:
            port = self._ports.get(loop)
            if port is None:
                self._refuse_closed()
                port = self._ports[loop] = _Port(loop)
        return port

    def _refuse_closed(self) -> None:
        if self._closed:
            raise RuntimeError("batcher: closed")

    def _wait(self, call: _Call, deadline_s: float | None) -> _core.BatchResult:
        wait = _seconds(deadline_s)
        try:
            return self._core.route(call.texts, call.x, call.tau, **call.options, deadline_s=wait)
        except (TypeError, ValueError) as error:
            raise by_the_caller_s_name(error, call.name) from None

    async def _result(self, call: _Call, deadline_s: float | None) -> _core.BatchResult:
        def submit(**options: Any) -> _core.Ticket:
            try:
                return self._core.submit(call.texts, call.x, call.tau, **call.options, **options)
            except (TypeError, ValueError) as error:
                raise by_the_caller_s_name(error, call.name) from None

        return await self._port().result(submit, _seconds(deadline_s))

    def _decision(self, call: _Call, result: _core.BatchResult) -> Decision:
        mode, guarantee = call.options["mode"], call.options["guarantee"]
        if result.choice[0] < 0:
            # tau, prices and available are valid ones here
            raise ValueError("text: expected an embedding that leaves finite scores, got NaN or infinity")
        if call.strict:
            self._router.check_strict(result.status, call.tau, mode, guarantee)
        answers = (result.choice, result.mu, result.score, result.status, result.certified_floor, result.scores)
        return self._router.decision_of(answers, mode, guarantee)

    def _batch(self, call: _Call, result: _core.BatchResult) -> RouteBatch:
        if call.strict:
            self._router.check_strict(result.status, call.tau, call.options["mode"], call.options["guarantee"])
        return self._like(call, (result.choice, result.mu, result.score, result.status, result.certified_floor))

    def _batch_of_none(self, call: _Call) -> RouteBatch:
        self._refuse_closed()
        x = np.empty((0, self._router.input_dim), np.float32)
        # the engine checks the other arguments
        mode, guarantee = call.options["mode"], call.options["guarantee"]
        return self._like(call, self._router.snapshot.route(x, call.tau, mode, guarantee))

    def _like(self, call: _Call, answers: Sequence[NDArray[Any]]) -> RouteBatch:
        if call.like is None or type(call.like) is np.ndarray:
            return RouteBatch(*answers)
        return RouteBatch(*[from_numpy(array, call.like) for array in answers])
